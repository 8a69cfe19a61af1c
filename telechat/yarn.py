"""TeleChat3's ``rope_scaling``: which context is stretched, and which frequencies."""

import dataclasses

from telechat import fields
from telechat.errors import InputError

KIND = "telechat3-yarn"  # what the published file calls it


@dataclasses.dataclass(frozen=True)
class YarnScaling:
    """TeleChat3's ``rope_scaling``: YaRN (arXiv:2309.00071), its factor and attention factor the publisher's own.

    Attributes:
        original_max_position_embeddings (int): tokens of the context that is stretched.
        beta_fast, beta_slow (float): turns within that context above which a frequency stays as it is, and below
            which it is divided by the factor.

    Raises:
        InputError: a value is out of range.
    """

    original_max_position_embeddings: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0

    def __post_init__(self):
        for name, read, bounds in (("original_max_position_embeddings", fields.whole_number, {"least": 1}),
                                   ("beta_fast", fields.real_number, {"above": 0}),
                                   ("beta_slow", fields.real_number, {"above": 0})):
            object.__setattr__(self, name, read(f"rope_scaling.{name}", getattr(self, name), **bounds))

    @classmethod
    def from_dict(cls, values):
        """From the ``rope_scaling`` of a file; None where that asks for nothing (null, or type "default").

        Raises InputError for another type, or where a field is missing or out of its bounds.
        """
        values = json_object("rope_scaling", values)
        if not values:
            return None
        kinds = {fields.shown(values[key]) for key in ("rope_type", "type") if values.get(key) is not None}
        if kinds == {repr("default")}:
            return None
        if kinds != {repr(KIND)}:
            found = " and ".join(sorted(kinds)) or "none"
            raise InputError(f'rope_scaling must be of the type "{KIND}" or null, and its type is {found}; '
                             "no other extension of the context is supported")
        if values.get("original_max_position_embeddings") is None:
            raise InputError("rope_scaling lacks original_max_position_embeddings")
        return cls(**{field.name: values[field.name] for field in dataclasses.fields(cls)
                      if values.get(field.name) is not None})

    def to_dict(self, length):
        """As a file has it; ``length``: the model's max_position_embeddings."""
        return {**dataclasses.asdict(self), "factor": length / self.original_max_position_embeddings,
                "rope_type": KIND, "type": KIND}


def json_object(name, value):
    """A dict as it is, {} for None, InputError else."""
    if value is not None and not isinstance(value, dict):
        raise InputError(f"{name} must be an object or null, not {fields.shown(value)}")
    return value or {}
