"""The three dtypes that weights come in, as numpy has them."""

import numpy as np

from telechat.errors import InputError

NAMES = ("float32", "float16", "bfloat16")


def numpy_dtype(name):
    """The numpy dtype called `name`, one of NAMES; bfloat16 is the one that MindSpore registers.

    Raises:
        InputError: another name.
    """
    if name not in NAMES:
        raise InputError(f"dtype must be one of {', '.join(NAMES)}, not {name}")
    if name == "bfloat16":
        from mindspore.common.np_dtype import bfloat16
        return np.dtype(bfloat16)
    return np.dtype(name)


def check_dtypes(dtypes, source):
    """Raise InputError where `dtypes` (tensor name → dtype name) of `source` holds another than NAMES."""
    wrong = [f"{name} is {dtype}" for name, dtype in dtypes.items() if dtype not in NAMES]
    if wrong:
        more = f" and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        raise InputError(f"{source} holds tensors that are not {', '.join(NAMES)}: "
                         f"{', '.join(wrong[:5])}{more}")


def cast(array, dtype, name):
    """`array` as `dtype` (a name, or None for as it is), rounded to nearest, ties to even.

    Raises:
        InputError: a finite value of the tensor called `name` would become infinite.
    """
    if dtype is None or array.dtype.name == dtype:
        return array
    with np.errstate(over="ignore", invalid="ignore"):  # NaN stays NaN; overflow is looked for below
        result = array.astype(np.float32, copy=False).astype(numpy_dtype(dtype))
    if dtype == "float16" and np.isinf(result).sum() > np.isinf(array).sum():
        raise InputError(f"{name} holds values beyond the range of float16; use bfloat16 or float32")
    return result
