"""Which device computes, and tensors in its memory.

A compiled graph updates what lies in the device's memory. Of a tensor in host memory it updates a copy: what else
shares that memory, as a Parameter does with its ``data``, keeps the old values, without a word. So whatever a graph writes
to (weights, master weights, moments, caches) is made here, and so is what many graphs read (masks, tables), which
would be copied at every call.
"""

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor, ops
from mindspore.common.np_dtype import bfloat16

from telechat.errors import InputError
from telechat.nn.large_pages import in_large_pages

_NUMPY = {ms.float32: np.float32, ms.float16: np.float16, ms.bfloat16: bfloat16}


def on_cpu():
    """Whether this process computes on a CPU."""
    return ms.get_context("device_target") == "CPU"


def device_tensor(value, dtype=None):
    """An array or Tensor as a Tensor in the device's memory.

    Args:
        value (array or Tensor): a Tensor that is there already is not copied.
        dtype: a MindSpore dtype; None: value's own.
    """
    tensor = value if isinstance(value, Tensor) else Tensor.from_numpy(np.ascontiguousarray(value))
    if not is_on_device(tensor):
        tensor = tensor.to(ms.get_context("device_target"))
    return tensor if dtype is None or tensor.dtype == dtype else tensor.astype(dtype)


class Sender:
    """Brings small arrays to the device without waiting for it, which a graph does at each argument in host memory.

    What is on its way stays in the host's memory as long as the Sender, until `clear`.
    """

    def __init__(self):
        self._sent = []

    def __call__(self, array):
        """A Tensor of an array, or one in the host's memory; on a CPU all is there."""
        tensor = array if isinstance(array, Tensor) else Tensor(array)
        if on_cpu():
            return tensor
        self._sent.append(tensor)
        return tensor.to(ms.get_context("device_target"), non_blocking=True)

    def clear(self):
        """To be called when the device has been read since."""
        self._sent.clear()


def device_zeros(shape, dtype):
    """Zeros in the device's memory."""
    return ops.zeros(shape, dtype)


def device_parameter(value, dtype, name=None):
    """A Parameter in the device's memory, in ``dtype``.

    value (array or Tensor): an array is copied; a Tensor in ``dtype`` is given up, and on a CPU its memory is the
    Parameter's.
    """
    if not on_cpu():
        tensor = value if isinstance(value, Tensor) else Tensor.from_numpy(np.ascontiguousarray(value))
        return move_to_device(Parameter(tensor.astype(dtype), name=name))
    wanted = np.dtype(_NUMPY[dtype])
    array = given = value.asnumpy() if isinstance(value, Tensor) else np.ascontiguousarray(value)
    if array.dtype != wanted:
        # Not by MindSpore, which keeps for itself what memory it converts in.
        array = array.astype(np.float32, copy=False).astype(wanted)
    array = in_large_pages(array)
    if array is given and not isinstance(value, Tensor):
        array = array.copy()
    # A Parameter copies its Tensor, unless nobody else refers to it; arguments by their names count.
    return Parameter(Tensor.from_numpy(array), name)


def move_to_device(parameter):
    """Bring a Parameter into the device's memory, where it is not there; returns it."""
    if not is_on_device(parameter):
        parameter.set_data(device_tensor(Tensor(parameter)))
    return parameter


def is_on_device(tensor):
    """Whether a Tensor's memory is the device's; on a CPU all is."""
    return on_cpu() or not tensor.device.startswith("CPU")


def check_placement(tensors):
    """InputError where one of some tensors is not in the device's memory.

    Args:
        tensors (dict): what it is called in words → Tensor.
    """
    wrong = [name for name, tensor in tensors.items() if not is_on_device(tensor)]
    if wrong:
        raise InputError(f"{wrong[0]}{f' and {len(wrong) - 1} more' if len(wrong) > 1 else ''}: in host memory, where a "
                         "graph's updates are lost; make such tensors by telechat.nn.device")
