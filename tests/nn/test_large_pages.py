"""Weights lie together in large pages, and a model takes the memory of what is given up to it."""

import pathlib

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor

from telechat.nn.device import device_parameter
from telechat.nn.large_pages import ALIGNED, LEAST, MOST, in_large_pages
from telechat.nn.quantised import QuantisedWeight, weight_parameters

SMAPS = pathlib.Path("/proc/self/smaps")


def has_large_pages(address):
    """Whether the mapping that an address is in asks for large pages."""
    inside = False
    for line in SMAPS.read_text().splitlines():
        first, _, rest = line.partition(" ")
        if "-" in first and not first.endswith(":"):
            start, end = (int(part, 16) for part in first.split("-"))
            inside = start <= address < end
        elif inside and first == "VmFlags:":
            return "hg" in rest.split()
    return False


@pytest.mark.skipif(not SMAPS.exists(), reason="needs Linux's /proc/self/smaps")
def test_arrays_are_copied_into_large_pages():
    arrays = [np.random.default_rng(size).integers(0, 99, size).astype(dtype)
              for size, dtype in ((LEAST, np.int8), (LEAST + 1, np.int8), (70_001, np.float32), (MOST // 4, np.float32))]
    for array, copy in [(array, in_large_pages(array)) for array in arrays]:
        assert copy.dtype == array.dtype and np.array_equal(copy, array) and not np.shares_memory(copy, array)
        assert copy.ctypes.data % ALIGNED == 0 and has_large_pages(copy.ctypes.data)
    for size in (LEAST - 1, MOST + 1):
        array = np.zeros(size, np.uint8)
        assert in_large_pages(array) is array


def test_they_do_not_overlap():
    copies = [in_large_pages(np.full(LEAST + number, number, np.uint8)) for number in range(99)]
    assert all((copy == number).all() for number, copy in enumerate(copies))


@pytest.mark.parametrize("dtype", [ms.float32, ms.bfloat16])
def test_a_large_tensor_is_given_up(dtype):
    """No copy, in whichever dtype; an array's owner keeps it."""
    tensor = Tensor(np.ones((3, MOST // 4), np.float32)).astype(dtype)
    assert device_parameter(tensor, dtype).data_ptr() == tensor.data_ptr()
    array = np.ones((2, 3), np.float32)
    parameter = device_parameter(array, ms.float32)
    array[:] = 5
    assert (parameter.asnumpy() == 1).all()


@pytest.mark.skipif(not SMAPS.exists(), reason="needs Linux's /proc/self/smaps")
@pytest.mark.parametrize("bits", [4, 8])
def test_quantised_weights_are_there_too(bits):
    values = np.random.default_rng(0).integers(-8, 8, (1024, 256)).astype(np.int8)
    weight = QuantisedWeight(bits, values, np.ones((1024, 16), np.float32))
    packed, scales = weight_parameters(weight, ms.float32)
    assert np.array_equal(packed.asnumpy(), weight.packed()) and (scales.asnumpy() == 1).all()
    assert has_large_pages(packed.data_ptr()) and has_large_pages(scales.data_ptr())
