"""Operators of the simulated card against torch in float64: element-wise, products, norms, rotation, loss, AdamW, dropout.

What each computes is said by CANN's documentation of the operator (hiascend.com, "aclnn" + its name) and its prototype
in CANN 8.1's headers; AdamW's step, which the kernel counts from 0, by the kernel's source in ops-nn.
"""

import pytest

from simulator.environment import unavailable

if unavailable():
    pytest.skip(unavailable(), allow_module_level=True)

import torch  # noqa: E402
from torch.nn import functional  # noqa: E402

from tests.simulator.aclnn import Float, Int8, Out, Refused, Scalar, call, empty  # noqa: E402

FLOATS = [torch.float32, torch.bfloat16, torch.float16]
STEP = {torch.float32: 2e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}  # half a unit in the last place, for 32 more
KEEP_DIMS, NO_SMOOTHING = True, 0.0


def normal(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape))).to(dtype)


def assert_close(result, expected, dtype=torch.float32, factor=1.0):
    """Within `factor` roundings of the dtype, of the largest value."""
    assert result.shape == expected.shape
    difference = (result.double() - expected.double()).abs().max().item()
    assert difference <= factor * STEP[dtype] * max(1.0, expected.double().abs().max().item()), difference


def like(tensor):
    return Out(torch.zeros_like(tensor))


@pytest.mark.parametrize("dtype", FLOATS)
def test_elementwise(dtype):
    x, y = normal(3, 4, dtype=dtype), normal(4, dtype=dtype)
    wide, other = x.double(), y.double()
    assert_close(call("aclnnAdd", x, y, Scalar(0.5), like(x)), wide + 0.5 * other, dtype)
    assert_close(call("aclnnSub", x.t(), x.t()[:, :1], Scalar(1, torch.int64), empty(4, 3, dtype=dtype)),
                 wide.t() - wide.t()[:, :1], dtype)
    assert_close(call("aclnnMul", x, y, like(x)), wide * other, dtype)
    assert_close(call("aclnnMuls", x, Scalar(0.3), like(x)), wide * 0.3, dtype)
    assert_close(call("aclnnDiv", x, y, like(x)), wide / other, dtype)
    assert_close(call("aclnnSigmoid", x, like(x)), wide.sigmoid(), dtype)
    assert_close(call("aclnnRsqrt", x.abs() + 1, like(x)), (x.abs() + 1).double().rsqrt(), dtype)
    condition = wide > 0
    assert torch.equal(call("aclnnGtTensor", x, torch.zeros(1, dtype=dtype), like(condition)), condition)
    assert torch.equal(call("aclnnSWhere", condition, x, y, like(x)), torch.where(condition, x, y.expand(3, 4)))
    assert_close(call("aclnnSoftmax", x, -1, like(x)), wide.softmax(-1), dtype)
    assert_close(call("aclnnSoftmaxBackward", x, wide.softmax(0).to(dtype), 0, like(x)),
                 torch._softmax_backward_data(wide, wide.softmax(0).to(dtype).double(), 0, torch.float64), dtype, 4)
    assert_close(call("aclnnReduceSum", x, [0], False, 0, empty(4, dtype=dtype)), wide.sum(0), dtype)
    assert_close(call("aclnnMean", x, [1], KEEP_DIMS, 0, empty(3, 1, dtype=dtype)), wide.mean(1, keepdim=True), dtype)
    assert_close(call("aclnnLinalgVectorNorm", x, Scalar(2), [], False, 0, empty()), torch.linalg.vector_norm(wide))


def test_whole_numbers_stay_exact():
    large = torch.tensor([2**53 + 1, -7], dtype=torch.int64)
    assert call("aclnnAdd", large, torch.ones(1, dtype=torch.int64), Scalar(1, torch.int64), like(large)).tolist() == [
        2**53 + 2, -6]
    assert call("aclnnFloorDivides", large, Scalar(2, torch.int64), like(large)).tolist()[1] == -4
    assert call("aclnnRemainderTensorScalar", large, Scalar(4, torch.int64), like(large)).tolist()[1] == 1
    assert call("aclnnReduceSum", large, [], False, 9, empty(dtype=torch.int64)).item() == 2**53 - 6
    assert call("aclnnArgMax", torch.tensor([[1, 5, 5], [9, 0, 2]]), 1, False, empty(2, dtype=torch.int64)).tolist() == [1, 0]


def test_moves_keep_every_bit():
    x = normal(2, 3, 4, dtype=torch.bfloat16)
    view = normal(4, 6, dtype=torch.bfloat16)[1:, ::2]
    assert torch.equal(call("aclnnInplaceCopy", Out(torch.zeros_like(x)), x), x)
    assert torch.equal(call("aclnnCast", view, 0, empty(3, 3)), view.float())
    assert torch.equal(call("aclnnCast", view.float() * 1.001, 27, empty(3, 3, dtype=torch.bfloat16)),
                       (view.float() * 1.001).bfloat16()), "to nearest, ties to even"
    assert torch.equal(call("aclnnPermute", x, [2, 0, 1], empty(4, 2, 3, dtype=x.dtype)), x.permute(2, 0, 1))
    assert torch.equal(call("aclnnCat", [x, x[:, :1]], 1, empty(2, 4, 4, dtype=x.dtype)), torch.cat((x, x[:, :1]), 1))
    assert torch.equal(call("aclnnRepeat", x, [2, 1, 3, 1], empty(2, 2, 9, 4, dtype=x.dtype)), x.repeat(2, 1, 3, 1))
    parts = call("aclnnSplitWithSize", x, [1, 3], 2, [empty(2, 3, 1, dtype=x.dtype), empty(2, 3, 3, dtype=x.dtype)])
    assert torch.equal(torch.cat(parts, 2), x)
    assert torch.equal(call("aclnnTriu", x, 1, like(x)), x.triu(1))
    assert call("aclnnArange", Scalar(3), Scalar(8), Scalar(2), empty(3)).tolist() == [3, 5, 7]
    assert call("aclnnInplaceZero", Out(x.clone())).abs().max() == 0
    ids = torch.tensor([[2, 0], [1, 2]])
    table = normal(3, 5, dtype=torch.bfloat16)
    assert torch.equal(call("aclnnEmbedding", table, ids, empty(2, 2, 5, dtype=table.dtype)), table[ids])
    assert torch.equal(call("aclnnIndexSelect", x, -1, ids[0], empty(2, 3, 2, dtype=x.dtype)), x[..., ids[0]])
    gradient = normal(2, 2, 5)
    expected = torch.zeros(3, 5).index_add(0, ids.flatten(), gradient.reshape(4, 5))
    assert_close(call("aclnnEmbeddingDenseBackward", gradient, ids, 3, -1, False, empty(3, 5)), expected)
    with pytest.raises(Refused, match="index 3 is outside"):
        call("aclnnEmbedding", table, ids + 1, empty(2, 2, 5, dtype=table.dtype))


@pytest.mark.parametrize("dtype", FLOATS)
def test_products(dtype):
    """Transposed views are taken as they are; a batch is broadcast; a bias is added before the one rounding."""
    a, b, bias = normal(5, 400, dtype=dtype), normal(33, 400, dtype=dtype), normal(33, dtype=dtype)
    exact = a.double() @ b.double().t()
    assert_close(call("aclnnMm", a, b.t(), empty(5, 33, dtype=dtype), Int8(0)), exact, dtype)
    assert_close(call("aclnnMatmul", a.t(), a, empty(400, 400, dtype=dtype), Int8(0)), a.t().double() @ a.double(), dtype)
    one = Scalar(1, torch.int64)
    assert_close(call("aclnnAddmm", bias, a, b.t(), one, one, empty(5, 33, dtype=dtype), Int8(0)),
                 exact + bias.double(), dtype)
    left, right = normal(2, 3, 5, 7, dtype=dtype), normal(2, 1, 4, 7, dtype=dtype).transpose(2, 3)
    assert_close(call("aclnnMatmul", left, right, empty(2, 3, 5, 4, dtype=dtype), Int8(0)),
                 left.double() @ right.double(), dtype)
    assert_close(call("aclnnMatmul", left, right[0, 0], empty(2, 3, 5, 4, dtype=dtype), Int8(0)),
                 left.double() @ right[0, 0].double(), dtype)
    assert_close(call("aclnnBatchMatMul", left[0], left[1].transpose(1, 2), empty(3, 5, 5, dtype=dtype), Int8(0)),
                 left[0].double() @ left[1].transpose(1, 2).double(), dtype)


def rms_norm(x, weight, epsilon):
    return x * (x.square().mean(-1, keepdim=True) + epsilon).rsqrt() * weight


@pytest.mark.parametrize("dtype", FLOATS)
def test_norms_and_swiglu(dtype):
    x, weight, incoming = (normal(*shape, dtype=dtype) for shape in ((2, 3, 64), (64,), (3, 2, 64)))
    incoming = incoming.transpose(0, 1)
    wide, scale = x.double().requires_grad_(), weight.double().requires_grad_()
    expected = rms_norm(wide, scale, 1e-5)
    expected.backward(incoming.double())
    normed, rstd = call("aclnnRmsNorm", x, weight, 1e-5, like(x), empty(2, 3, 1))
    assert_close(normed, expected.detach(), dtype)
    assert_close(rstd, (x.double().square().mean(-1, keepdim=True) + 1e-5).rsqrt())
    gradient, weight_gradient = call("aclnnRmsNormGrad", incoming, x, rstd, weight, like(x), empty(64))
    assert_close(gradient, wide.grad, dtype)
    assert_close(weight_gradient, scale.grad)
    delta = normal(2, 3, 64, dtype=dtype, seed=9)
    normed, _, total = call("aclnnAddRmsNorm", x, delta, weight, 1e-5, like(x), empty(2, 3, 1), like(x))
    assert_close(total, x.double() + delta.double(), dtype)
    assert_close(normed, rms_norm(x.double() + delta.double(), weight.double(), 1e-5), dtype)

    wide = x.double().requires_grad_()
    expected = functional.silu(wide[..., :32]) * wide[..., 32:]
    expected.backward(incoming[..., :32].double())
    assert_close(call("aclnnSwiGlu", x, -1, empty(2, 3, 32, dtype=dtype)), expected.detach(), dtype)
    assert_close(call("aclnnSwiGluGrad", incoming[..., :32], x, -1, like(x)), wide.grad, dtype)


def rotated(x):
    return torch.cat((-x[..., x.shape[-1] // 2:], x[..., :x.shape[-1] // 2]), -1)


@pytest.mark.parametrize("dtype", FLOATS)
def test_rotation(dtype):
    x, incoming = normal(2, 5, 3, 32, dtype=dtype), normal(2, 5, 3, 32, dtype=dtype, seed=1)
    tables = [normal(1, 5, 1, 32, dtype=dtype, seed=seed) for seed in (2, 3)]
    wide, cos, sin = (tensor.double().requires_grad_() for tensor in (x, *tables))
    expected = wide * cos + rotated(wide) * sin
    expected.backward(incoming.double())
    assert_close(call("aclnnRotaryPositionEmbedding", x, *tables, 0, like(x)), expected.detach(), dtype)
    results = call("aclnnRotaryPositionEmbeddingGrad", incoming, *tables, x, 0, like(x), *map(like, tables))
    for result, tensor in zip(results, (wide, cos, sin), strict=True):
        assert_close(result, tensor.grad, dtype)


@pytest.mark.parametrize("shape, table, dtype, words", [
    ((2, 9, 2, 32), (1, 1, 2, 32), torch.bfloat16, "BNSD, B·N = 18 must not be above 8·S = 16"),
    ((2, 3, 5, 24), (1, 1, 5, 24), torch.bfloat16, "not aligned"),
    ((2, 5, 3, 31), (1, 5, 1, 31), torch.bfloat16, "even"),
    ((2, 5, 3, 898), (1, 5, 1, 898), torch.bfloat16, "at most 896"),
    ((2, 5, 3, 32), (1, 4, 1, 32), torch.bfloat16, "axis 1 of cos must be 1 or 5"),
    ((2, 5, 32), (1, 5, 32), torch.bfloat16, "dimensions"),
])
def test_rotations_that_cann_refuses(shape, table, dtype, words):
    x, cos = normal(*shape, dtype=dtype), normal(*table, dtype=dtype)
    with pytest.raises(Refused, match=words):
        call("aclnnRotaryPositionEmbedding", x, cos, cos, 0, like(x))


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("weighted", [False, True])
def test_cross_entropy(reduction, smoothing, weighted):
    logits, labels = normal(6, 11), torch.tensor([0, 3, -100, 10, 5, 5])
    weights = torch.rand(11, generator=torch.Generator().manual_seed(1)) if weighted else None
    wide = logits.double().requires_grad_()
    expected = functional.cross_entropy(wide, labels, None if weights is None else weights.double(), ignore_index=-100,
                                        reduction=reduction, label_smoothing=smoothing)
    incoming = normal(6) if reduction == "none" else normal(1)[0]
    expected.backward(incoming.double())
    loss, log_probabilities, _, _ = call(
        "aclnnCrossEntropyLoss", logits, labels, weights, reduction, -100, smoothing, NO_SMOOTHING, False,
        empty(6 if reduction == "none" else 1), empty(6, 11), empty(1), empty(6))
    assert_close(loss.reshape(expected.shape), expected.detach())
    assert_close(log_probabilities, wide.detach().log_softmax(-1))
    assert_close(call("aclnnCrossEntropyLossGrad", incoming, log_probabilities, labels, weights, None, None, reduction,
                      -100, smoothing, NO_SMOOTHING, empty(6, 11)), wide.grad)


def test_a_label_that_is_no_class_is_refused():
    with pytest.raises(Refused, match="target 11 at 0 is outside 0 to 10"):
        call("aclnnCrossEntropyLoss", normal(1, 11), torch.tensor([11]), None, "none", -100, 0.0, 0.0, False, empty(1),
             empty(1, 11), empty(1), empty(1))
    with pytest.raises(Refused, match="target is int32, must be one of int64"):
        call("aclnnCrossEntropyLoss", normal(1, 11), torch.zeros(1, dtype=torch.int32), None, "none", -100, 0.0, 0.0,
             False, empty(1), empty(1, 11), empty(1), empty(1))


@pytest.mark.parametrize("gradient_dtype", [torch.float32, torch.bfloat16])
def test_adamw_equals_torch(gradient_dtype):
    weight = normal(7, 5)
    parameter = torch.nn.Parameter(weight.double())
    optimizer = torch.optim.AdamW([parameter], lr=0.01, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    first, second = torch.zeros(7, 5), torch.zeros(7, 5)
    for step in range(3):
        gradient = normal(7, 5, seed=step + 1, dtype=gradient_dtype)
        parameter.grad = gradient.double()
        optimizer.step()
        weight, first, second = call(
            "aclnnApplyAdamWV2", Out(weight), Out(first), Out(second), None, gradient, torch.tensor([float(step)]),
            *map(Float, (0.01, 0.9, 0.95, 0.1, 1e-8)), False, False)
        assert_close(weight, parameter.detach())
    with pytest.raises(Refused, match="grad is float32, must be one of bfloat16"):
        call("aclnnApplyAdamWV2", *(Out(weight.bfloat16()) for _ in range(3)), None, weight, torch.zeros(1),
             *map(Float, (0.01, 0.9, 0.95, 0.1, 1e-8)), False, False)


def bits_of(mask, count):
    """The bits of bytes, lowest first."""
    return (mask[:, None] >> torch.arange(8, dtype=torch.uint8) & 1).flatten()[:count].bool()


def test_dropout_masks_are_by_seed_and_offset():
    def mask(seed, offset, probability=0.3):
        return call("aclnnDropoutGenMaskV2", [100, 100], probability, seed, offset, 0, empty(1264, dtype=torch.uint8))

    one = mask(7, 0)
    assert torch.equal(one, mask(7, 0))
    share = bits_of(one, 10000).double().mean().item()
    assert abs(share - 0.7) < 4 * (0.3 * 0.7 / 10000) ** 0.5, "four deviations"
    for other in (mask(8, 0), mask(7, 1), mask(7, 2**40)):
        agreeing = (bits_of(one, 10000) == bits_of(other, 10000)).double().mean().item()
        assert abs(agreeing - 0.58) < 4 * (0.58 * 0.42 / 10000) ** 0.5, "as independent masks agree"
    assert bits_of(mask(7, 0, 0.0), 10000).all() and not bits_of(mask(7, 0, 1.0), 10000).any()
    x = normal(100, 100, dtype=torch.bfloat16)
    expected = torch.where(bits_of(one, 10000).reshape(100, 100), x.double() / 0.7, 0.0)
    assert_close(call("aclnnDropoutDoMask", x, one, 0.3, like(x)), expected, torch.bfloat16)
    with pytest.raises(Refused, match="shape"):
        call("aclnnDropoutGenMaskV2", [100, 100], 0.3, 7, 0, 0, empty(1250, dtype=torch.uint8))


@pytest.mark.parametrize("name, arguments, words", [
    ("aclnnSigmoid", [torch.ones(2, dtype=torch.int32), empty(2)], "self is int32"),
    ("aclnnDiv", [torch.ones(2, dtype=torch.int32)] * 2 + [empty(2, dtype=torch.int32)], "out is int32"),
    ("aclnnSoftmax", [torch.ones(2, dtype=torch.int64), 0, empty(2)], "self is int64"),
    ("aclnnBitwiseAndTensor", [torch.ones(2)] * 2 + [empty(2)], "self is float32"),
    ("aclnnAdd", [torch.ones(2), torch.ones(3), Scalar(1), empty(2)], "cannot be broadcast"),
    ("aclnnAdd", [torch.ones(2), torch.ones(2), Scalar(1), empty(3)], "out has shape .3., must have .2."),
    ("aclnnCast", [torch.ones(2), 1, empty(2)], "out is float32, must be one of float16"),
    ("aclnnMm", [torch.ones(2, 3), torch.ones(2, 3), empty(2, 3), Int8(0)], "inner axes 3 and 2 differ"),
    ("aclnnMm", [torch.ones(2, 3).bfloat16(), torch.ones(3, 2), empty(2, 2), Int8(0)], "differ in dtype"),
    ("aclnnMm", [torch.ones(2, 3, dtype=torch.int32)] * 2 + [empty(2, 3), Int8(0)], "self is int32"),
    ("aclnnRmsNorm", [torch.ones(2, 4), torch.ones(3), 1e-5, empty(2, 4), empty(2, 1)], "gamma must have the shape"),
    ("aclnnRmsNorm", [torch.ones(2, 4), torch.ones(4).bfloat16(), 1e-5, empty(2, 4), empty(2, 1)], "gamma must be"),
    ("aclnnAddRmsNorm", [torch.ones(2, 4).half(), torch.ones(2, 4), torch.ones(4), 1e-5, empty(2, 4), empty(2, 1),
                         empty(2, 4)], "x2 is float32, must be one of float16"),
    ("aclnnSwiGlu", [torch.ones(2, 5), -1, empty(2, 2)], "cannot be halved"),
    ("aclnnSWhere", [torch.ones(2), torch.ones(2), torch.ones(2), empty(2)], "condition is float32"),
    ("aclnnCat", [[torch.ones(2, 2), torch.ones(3, 2)], 1, empty(2, 4)], "shape"),
    ("aclnnApplyAdamWV2", [*(Out(torch.ones(2)) for _ in range(3)), None, torch.ones(2), torch.ones(2),
                           *map(Float, (0.1, 0.9, 0.9, 0.0, 0.0)), False, False], "step must have one element"),
])
def test_calls_that_cann_refuses(name, arguments, words):
    with pytest.raises(Refused, match=words):
        call(name, *arguments)
