"""LoraConfig: what a run's ``lora`` says of the adapter that it trains."""

import dataclasses
import math

from telechat import fields
from telechat.errors import InputError

TARGETS = ("query", "key_value", "dense", "gate_proj", "up_proj", "down_proj")


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """A LoRA adapter (arXiv:2106.09685): y = Wx + s·B(A·dropout(x)), where only A and B are trained.

    Raises:
        InputError: a value is out of range or of the wrong type; the message names the key.
    """

    rank: int = 16
    alpha: float = 32.0  # s is alpha / rank
    dropout: float = 0.0  # of what A is given
    targets: tuple = TARGETS  # weights that get one, in every layer
    rslora: bool = False  # s is alpha / √rank (arXiv:2312.03732)

    def __post_init__(self):
        fixed = {"rank": fields.whole_number("lora.rank", self.rank, 1, 2 ** 16),
                 "alpha": float(fields.real_number("lora.alpha", self.alpha, above=0)),
                 "dropout": float(fields.real_number("lora.dropout", self.dropout, least=0, below=1)),
                 "rslora": fields.flag("lora.rslora", self.rslora)}
        if not isinstance(self.targets, (list, tuple)) or not self.targets:
            raise InputError(f"lora.targets must be a list of {', '.join(TARGETS)}, not {fields.shown(self.targets)}")
        for target in self.targets:
            if target not in (*TARGETS, "key", "value"):
                raise InputError(f"lora.targets holds {fields.shown(target)}; each must be one of {', '.join(TARGETS)}")
        fixed["targets"] = tuple(dict.fromkeys(self.targets))
        for name, value in fixed.items():
            object.__setattr__(self, name, value)

    @property
    def scale(self):
        """s."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    def to_dict(self):
        """As a YAML file holds it."""
        return {**dataclasses.asdict(self), "targets": list(self.targets)}
