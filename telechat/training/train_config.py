"""TrainConfig: how a model is trained, apart from data and files."""

import dataclasses

from telechat import fields
from telechat.errors import InputError
from telechat.training.loss_scale import LARGEST

SCHEDULES = ("cosine", "linear", "constant")


# How each field is read, with its bounds.
_FIELDS = (
    (fields.one_of, {"choices": SCHEDULES}, ("lr_schedule",)),
    (fields.one_of, {"choices": ("float32", "bfloat16", "float16")}, ("dtype",)),
    (fields.one_of, {"choices": ("ascend", "cpu", "portable"), "default": None}, ("kernels",)),
    (fields.flag, {}, ("mask_padding", "document_mask", "restart_positions")),
    (fields.flag, {"default": None}, ("use_flash_attention",)),
    (fields.whole_number, {"least": 1}, ("total_steps", "micro_batches", "loss_scale_window")),
    (fields.whole_number, {"most": 2 ** 32 - 1}, ("seed",)),  # what numpy's generators take
    (fields.whole_number, {"default": None}, ("warmup_steps",)),
    (fields.real_number, {"least": 0, "most": 1, "default": None}, ("warmup_ratio",)),
    (fields.real_number, {"least": 0}, ("learning_rate", "min_learning_rate", "weight_decay", "max_grad_norm")),
    (fields.real_number, {"least": 1, "most": LARGEST}, ("loss_scale",)),
    (fields.real_number, {"above": 0, "most": 1}, ("eps",)),
)


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Hyper-parameters of the optimizer and its schedule.

    Raises:
        InputError: a value is out of range; the message names the field.
    """

    learning_rate: float = 1e-5
    lr_schedule: str = "cosine"
    warmup_steps: int = None  # or warmup_ratio
    warmup_ratio: float = None  # of total_steps
    total_steps: int = 1000
    min_learning_rate: float = 0.0
    betas: tuple = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.1  # on parameters of two and more dimensions
    max_grad_norm: float = 1.0  # 0: no clipping
    micro_batches: int = 1  # gradient accumulation: a batch is cut into this many
    mask_padding: bool = False  # hide the pad tokens on the left from attention; the official recipe does not
    document_mask: bool = False  # keep packed conversations apart; the official recipe has one causal sequence
    restart_positions: bool = False  # with document_mask: positions count from 0 in each conversation
    seed: int = 0
    dtype: str = "float32"  # of the working weights; master weights and moments are float32
    loss_scale: float = 65536.0  # the first one, in float16 only
    loss_scale_window: int = 1000  # steps without an overflow after which it doubles
    kernels: str = None  # "ascend", "cpu" or "portable" operations; None: what the device has
    use_flash_attention: bool = None  # False: off; True: refuse a model that cannot have it; None: where it is

    def __post_init__(self):
        object.__setattr__(self, "betas", tuple(self.betas) if isinstance(self.betas, (list, tuple)) else self.betas)
        for read, bounds, names in _FIELDS:
            for name in names:
                object.__setattr__(self, name, read(name, getattr(self, name), **bounds))
        if self.restart_positions and not self.document_mask:
            raise InputError("restart_positions goes with document_mask; set that to true as well")
        if self.warmup_steps is not None and self.warmup_ratio is not None:
            raise InputError("give warmup_steps or warmup_ratio, not both")
        if self.min_learning_rate > self.learning_rate:
            raise InputError(f"min_learning_rate {self.min_learning_rate} is above learning_rate {self.learning_rate}")
        betas = self.betas
        if not isinstance(betas, tuple) or len(betas) != 2:
            raise InputError(f"betas must be two numbers in [0, 1), not {fields.shown(betas)}")
        for beta in betas:
            fields.real_number("each of betas", beta, least=0, below=1)

    @property
    def resolved_warmup_steps(self):
        """Number of warm-up steps, whichever way it was given."""
        if self.warmup_ratio is not None:
            return round(self.warmup_ratio * self.total_steps)
        return self.warmup_steps or 0
