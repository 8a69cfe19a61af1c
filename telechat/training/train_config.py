"""TrainConfig: how a model is trained, apart from data and files."""

import dataclasses
import math

from telechat.errors import InputError
from telechat.training.loss_scale import LARGEST

SCHEDULES = ("cosine", "linear", "constant")


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
    kernels: str = None  # "ascend" or "portable" operations; None: what the device has
    use_flash_attention: bool = None  # False: off; True: refuse a model that cannot have it; None: where it is

    def __post_init__(self):
        object.__setattr__(self, "betas", tuple(self.betas) if isinstance(self.betas, (list, tuple)) else self.betas)
        if self.lr_schedule not in SCHEDULES:
            raise InputError(f"lr_schedule must be one of {', '.join(SCHEDULES)}, not {self.lr_schedule!r}")
        if self.dtype not in ("float32", "bfloat16", "float16"):
            raise InputError(f"dtype must be float32, bfloat16 or float16, not {self.dtype!r}")
        if self.kernels not in (None, "ascend", "portable"):
            raise InputError(f'kernels must be "ascend" or "portable", not {self.kernels!r}')
        if self.use_flash_attention not in (None, True, False):
            raise InputError(f"use_flash_attention must be true or false, not {self.use_flash_attention!r}")
        for name in ("mask_padding", "document_mask", "restart_positions"):
            if not isinstance(getattr(self, name), bool):
                raise InputError(f"{name} must be true or false, not {getattr(self, name)!r}")
        if self.restart_positions and not self.document_mask:
            raise InputError("restart_positions goes with document_mask; set that to true as well")
        if self.warmup_steps is not None and self.warmup_ratio is not None:
            raise InputError("give warmup_steps or warmup_ratio, not both")
        self._number("loss_scale", 1, LARGEST)
        for name, least in (("total_steps", 1), ("micro_batches", 1), ("seed", 0), ("loss_scale_window", 1)):
            self._whole(name, least)
        if self.warmup_steps is not None:
            self._whole("warmup_steps", 0)
        if self.warmup_ratio is not None:
            self._number("warmup_ratio", 0, 1)
        for name in ("learning_rate", "min_learning_rate", "weight_decay", "max_grad_norm"):
            self._number(name, 0, math.inf)
        if self._number("eps", 0, 1) == 0:
            raise InputError("eps must be above 0")
        if self.min_learning_rate > self.learning_rate:
            raise InputError(f"min_learning_rate {self.min_learning_rate} is above learning_rate {self.learning_rate}")
        if not (isinstance(self.betas, tuple) and len(self.betas) == 2
                and all(isinstance(beta, (int, float)) and 0 <= beta < 1 for beta in self.betas)):
            raise InputError(f"betas must be two numbers in [0, 1), not {self.betas!r}")

    def _whole(self, name, least):
        value = getattr(self, name)
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise InputError(f"{name} must be a whole number of at least {least}, not {value!r}")

    def _number(self, name, least, most):
        value = getattr(self, name)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not least <= value <= most \
                or not math.isfinite(value):
            raise InputError(f"{name} must be a number from {least} to {most}, not {value!r}")
        return value

    @property
    def resolved_warmup_steps(self):
        """Number of warm-up steps, whichever way it was given."""
        if self.warmup_ratio is not None:
            return round(self.warmup_ratio * self.total_steps)
        return self.warmup_steps or 0
