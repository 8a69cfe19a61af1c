"""aclnnWeightQuantBatchMatmulV2 on the simulated card: against torch in float64, and what it refuses."""

import json

import pytest

from simulator.environment import unavailable

if unavailable():
    pytest.skip(unavailable(), allow_module_level=True)

import torch  # noqa: E402

from telechat.errors import InputError  # noqa: E402
from tests.simulator.aclnn import Int4, Refused, call, empty  # noqa: E402

HALVES = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
K, N = 96, 24


def numbers(bits, rows=K, columns=N):
    most = 2 ** (bits - 1)
    return torch.randint(-most, most, (rows, columns), generator=torch.Generator().manual_seed(0), dtype=torch.int8)


def weight(values, bits, turned=False):
    """(k, n), or the transpose of (n, k)."""
    held = values.T.contiguous() if turned else values
    return Int4(held, turned) if bits == 4 else held.T if turned else held


def product(x, w, scale, *, offset=None, bias=None, group=0, columns=N):
    out = empty(x.shape[0], columns, dtype=x.dtype)
    return call("aclnnWeightQuantBatchMatmulV2", x, w, scale, offset, None, None, bias, group, out)


def expected(x, values, scale, offset=0):
    """The weight is rounded to x's dtype, the product at its end."""
    rows = torch.arange(K) * len(scale) // K
    dequantised = ((values.float() + offset) * scale.float()[rows]).to(x.dtype)
    return x.double() @ dequantised.double()


@HALVES
@pytest.mark.parametrize("turned", [False, True], ids=["as it lies", "transposed"])
@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("bits", [4, 8])
def test_products(bits, groups, turned, dtype):
    torch.manual_seed(1)
    values, x = numbers(bits), torch.randn(5, K).to(dtype)
    scale = torch.rand(groups, N).to(dtype) + 0.5
    found = product(x, weight(values, bits, turned), scale if groups > 1 else scale[0], group=K // groups if groups > 1 else 0)
    wanted = expected(x, values, scale)
    assert (found.double() - wanted).abs().max() < (2 ** -8 if dtype == torch.bfloat16 else 2 ** -11) * wanted.abs().max()


@HALVES
def test_offset_bias_and_one_scale_for_all(dtype):
    torch.manual_seed(1)
    values, x, one = numbers(8), torch.randn(5, K).to(dtype), torch.tensor([0.75], dtype=dtype)
    offset, bias = torch.tensor([3.0], dtype=dtype), torch.randn(N) * 1000
    bias = bias if dtype == torch.bfloat16 else bias.to(dtype)
    found = product(x, values, one, offset=offset, bias=bias)
    wanted = expected(x, values, one.expand(1, N), 3) + bias.double()
    assert (found.double() - wanted).abs().max() < 2 ** -8 * wanted.abs().max()


def test_dtypes_of_the_table(shared):
    """Every column of CANN's own table that is simulated: ND, of 8 or 4 bits, whose result has x's dtype."""
    entry = json.loads((shared / "ascend/ops_910b_cann81.json").read_text())["WeightQuantBatchMatmulV2"]
    names = [f"input{place}" for place in range(4)] + ["output0"]
    columns = set(zip(*(entry[name]["dtype"].split(",") for name in names), entry["input1"]["format"].split(",")))
    dtypes = {"float16": torch.float16, "bfloat16": torch.bfloat16}
    ran = 0
    for x, w, scale, offset, y, form in columns:
        if form == "ND" and w in ("int8", "int4") and scale in dtypes and y in dtypes:
            assert x == scale == offset == y
            ones = torch.ones(1, N, dtype=dtypes[x])
            product(torch.ones(2, K, dtype=dtypes[x]), weight(numbers(4), int(w[3:])), ones, offset=ones)
            ran += 1
    assert ran == 4


X, SCALE = torch.ones(2, K, dtype=torch.bfloat16), torch.ones(3, N, dtype=torch.bfloat16)


@pytest.mark.parametrize("change, words", [
    (dict(x=X.float()), "x is float32"), (dict(scale=SCALE.half()), "antiquantScale is float16"),
    (dict(scale=SCALE[:2]), "antiquantScale has shape"), (dict(group=16), "antiquantGroupSize must be 0, or a multiple of 32"),
    (dict(group=K), "antiquantGroupSize must be 0"), (dict(group=0), "antiquantScale has shape"),
    (dict(bias=torch.ones(N, dtype=torch.bfloat16)), "bias is bfloat16"), (dict(bias=torch.ones(N + 1)), "bias has shape"),
    (dict(w=numbers(8).int()), "weights of int32"), (dict(w=numbers(8)[:64]), "the inner axes 96 and 64 differ"),
    (dict(w=numbers(8)[:, ::2], columns=N // 2), "must lie in their order"), (dict(offset=SCALE[:1]), "antiquantOffset has shape"),
    (dict(w=Int4(numbers(4, N - 1, K).T.contiguous().T, True), columns=N - 1, scale=SCALE[:, 1:]), None),
    (dict(w=numbers(8, K, 65_536), columns=65_536, scale=torch.ones(3, 65_536, dtype=torch.bfloat16)), "k and n must be from 1 to 65535"),
])
def test_refusals(change, words):
    given = {**dict(x=X, w=numbers(8), scale=SCALE, group=32), **change}
    if words is None:  # an odd number of outputs, but of the even inner axis of a transposed weight
        product(**given)
        return
    with pytest.raises(Refused, match=words):
        product(**given)


# What is wrong in a call, and the argument that our binding names.
LIMITS = {
    "activations of float32": (dict(x=X.float()), "x"),
    "activations of three dimensions": (dict(x=X[None]), "x"),
    "weights of int32": (dict(w=numbers(8).int()), "values"),
    "another inner axis": (dict(w=numbers(8)[:64]), "values"),
    "more than 65,535 outputs": (dict(w=numbers(8, K, 65_536), scale=torch.ones(65_536, dtype=X.dtype)), "values"),
    "scales of another dtype": (dict(scale=SCALE.half()), "scales"),
    "scales of other outputs": (dict(scale=SCALE[:, 1:]), "scales"),
    "groups of 48 inputs": (dict(scale=SCALE[:2]), "scales"),
    "groups of 16 inputs": (dict(scale=SCALE.repeat(2, 1)), "scales"),
    "one group in two dimensions": (dict(scale=SCALE[:1]), "scales"),
}


@pytest.mark.parametrize("name", LIMITS)
def test_a_wrong_call_is_refused_by_card_and_binding(name):
    wrong, argument = LIMITS[name]
    with pytest.raises(Refused):
        on_card(**wrong)
    with pytest.raises(InputError, match=f"^quantised product: {argument} "):
        by_binding(**wrong)


@pytest.mark.parametrize("right", [{}, dict(scale=SCALE[0]), dict(w=Int4(numbers(4)))], ids=["groups", "one group", "4 bits"])
def test_a_right_call_is_taken_by_both(right):
    on_card(**right)
    by_binding(**right)


def test_an_odd_number_of_outputs_of_4_bits():
    """MindSpore's tensors of 4 bits cannot say it, so the binding asks before it makes one."""
    from telechat.nn.quantised import QuantisedWeight
    from telechat.nn.quantised_matmul import obstacle

    import mindspore as ms
    import numpy as np

    with pytest.raises(Refused, match="of int4 the inner axis must be even"):
        on_card(w=Int4(numbers(4, K, N + 1)), scale=torch.ones(3, N + 1, dtype=X.dtype))
    weight = QuantisedWeight(4, np.zeros((N + 1, K), np.int8), np.ones((N + 1, 3), np.float32))
    assert "even number of outputs" in obstacle(weight, ms.bfloat16)


def outputs_of(w):
    return (w.numbers if isinstance(w, Int4) else w).shape[1]


def on_card(x=X, w=numbers(8), scale=SCALE):
    """As the binding asks: the size of groups from the scales' shape."""
    group = 0 if scale.dim() == 1 else x.shape[-1] // len(scale)
    out = empty(*x.shape[:-1], outputs_of(w), dtype=x.dtype)
    call("aclnnWeightQuantBatchMatmulV2", x, w, scale, None, None, None, None, group, out)


def by_binding(x=X, w=numbers(8), scale=SCALE):
    import mindspore as ms

    from telechat.nn import quantised_matmul as binding

    names = {torch.float32: ms.float32, torch.float16: ms.float16, torch.bfloat16: ms.bfloat16, torch.int8: ms.int8,
             torch.int32: ms.int32}
    values = ((w.numbers.shape[0], outputs_of(w) // 2), ms.qint4x2) if isinstance(w, Int4) else (tuple(w.shape), names[w.dtype])
    binding._check(tuple(x.shape), names[x.dtype], *values, tuple(scale.shape), names[scale.dtype])
