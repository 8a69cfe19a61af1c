"""The binding of WeightQuantBatchMatmul: how weights lie, the graph, and what it refuses, by argument."""

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, nn

from telechat.errors import InputError
from telechat.nn.quantised import QuantisedWeight
from telechat.nn.quantised_matmul import obstacle, quantised_matmul, tensors
from tests.ascend.mindir import export


def weight_of(bits, outputs, inputs, groups):
    random = np.random.default_rng(bits)
    most = 2 ** (bits - 1)
    return QuantisedWeight(bits, random.integers(-most, most, (outputs, inputs)).astype(np.int8),
                           random.uniform(0.5, 1.5, (outputs, groups)).astype(np.float16).astype(np.float32))


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("bits", [4, 8])
def test_how_weights_lie(bits, groups):
    """Inputs in rows; of 4 bits the first of two outputs in a byte's lower half, as two's complement."""
    weight = weight_of(bits, 6, 96, groups)
    values, scales = tensors(weight, ms.float16)
    held = values.asnumpy()
    assert held.shape == (96, 6 if bits == 8 else 3) and values.dtype == (ms.int8 if bits == 8 else ms.qint4x2)
    for i in range(0, 96, 7):
        for o in range(6):
            number = int(held[i, o]) if bits == 8 else int(held[i, o // 2]) >> 4 * (o % 2) & 15
            assert number == (weight.values[o, i] if bits == 8 else weight.values[o, i] % 16)
    assert np.array_equal(scales.asnumpy(), weight.scales[:, 0] if groups == 1 else weight.scales.T)


class Product(nn.Cell):
    def construct(self, x, values, scales):
        return quantised_matmul(x, values, scales)


@pytest.mark.parametrize("bits, groups, group", [(4, 4, 32), (8, 2, 64), (8, 1, 0)])
def test_the_graph(bits, groups, group):
    """One operation, nothing transposed, without offset, bias and results of 8 bits."""
    values, scales = tensors(weight_of(bits, 48, 128, groups), ms.bfloat16)
    graph = export(Product(), Tensor(np.ones((5, 128), np.float32)).astype(ms.bfloat16), values, scales)
    operation, = graph.named("WeightQuantBatchMatmul")
    assert graph.kernels() == 1
    assert operation.outputs == [("bfloat16", (5, 48))]
    assert operation.constants[3:] == ["none"] * 4 + [False, False, group]


X, VALUES, SCALES = (ms.bfloat16, 5, 128), (ms.int8, 128, 48), (ms.bfloat16, 4, 48)


@pytest.mark.parametrize("argument, changes, words", [
    ("x", dict(x=(ms.float32, 5, 128)), "must be float16 or bfloat16 of two dimensions, not Float32 .5, 128."),
    ("values", dict(values=(ms.int32, 128, 48)), "must be int8 or qint4x2, not Int32"),
    ("values", dict(values=(ms.int8, 96, 48)), "must be .128, outputs., not .96, 48."),
    ("scales", dict(scales=(ms.float32, 4, 48)), "must be BFloat16 as x is, not Float32"),
    ("scales", dict(scales=(ms.bfloat16, 4, 24)), "must be .48,. or .groups, 48., not .4, 24."),
    ("scales", dict(scales=(ms.bfloat16, 8, 48)), "groups of a multiple of 32 inputs fewer than 128, not of 16"),
    ("scales", dict(scales=(ms.bfloat16, 1, 48)), "groups of a multiple of 32 inputs fewer than 128, not of 128"),
    ("values", dict(x=(ms.bfloat16, 1, 2), values=(ms.int8, 2, 70_000), scales=(ms.bfloat16, 70_000)),
     "at most 65535 inputs and outputs, not 2 and 70000"),
])
def test_wrong_arguments_are_named(argument, changes, words):
    given = {**dict(x=X, values=VALUES, scales=SCALES), **changes}
    with pytest.raises(InputError, match=f"^quantised product: {argument} .*{words}"):
        quantised_matmul(*(Tensor(np.zeros(shape, np.float32)).astype(dtype) for dtype, *shape in given.values()))


def test_what_it_cannot_have():
    assert obstacle(weight_of(4, 6, 96, 3), ms.bfloat16) is None and obstacle(weight_of(8, 5, 96, 1), ms.float16) is None
    assert "not float32" in obstacle(weight_of(8, 6, 96, 3), ms.float32)
    assert "groups of a multiple of 32 inputs, not 48" in obstacle(weight_of(8, 6, 96, 2), ms.float16)
    assert "even number of outputs of 4 bits, not 5" in obstacle(weight_of(4, 5, 96, 3), ms.float16)
