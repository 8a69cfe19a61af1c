"""The operators for CPUs, forward and backward, against torch in float64: odd sizes, and any number of threads."""

import os
import signal
import time

import mindspore as ms
import numpy as np
import pytest
import torch
from mindspore import Tensor, ops

from telechat.config import TeleChatConfig
from telechat.nn.cpu.build import default_threads, load_library
from telechat.nn.dropout import Place, dropout_mask

if load_library() is None:
    pytest.skip("needs a C++ compiler, which is not here", allow_module_level=True)

from telechat.nn.cpu.kernels import CpuKernels  # noqa: E402
from telechat.nn.cpu.operators import dropout_masks  # noqa: E402

KERNELS = CpuKernels()


@pytest.fixture(autouse=True, params=[1, 3])
def threads(request):
    """Each test with one thread and with more than there are cores."""
    load_library().set_thread_count(request.param)
    yield request.param
    load_library().set_thread_count(default_threads())


def draw(*shape, seed=0):
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(np.float32)


def compare(ours, theirs, *arrays, tolerance=2e-6):
    """Results and gradients in every array; the output is weighted with fixed numbers."""
    tensors = [torch.tensor(array, dtype=torch.float64, requires_grad=True) for array in arrays]
    expected = theirs(*tensors)
    weights = draw(*expected.shape, seed=1)
    expected.backward(torch.tensor(weights, dtype=torch.float64))
    inputs = list(map(Tensor, arrays))
    actual = ours(*inputs)
    gradients = ops.GradOperation(get_all=True, sens_param=True)(ours)(*inputs, Tensor(weights))
    for mine, reference in [(actual, expected), *zip(gradients, (tensor.grad for tensor in tensors))]:
        reference = reference.detach().numpy()
        assert mine.shape == reference.shape
        assert np.abs(mine.asnumpy() - reference).max() <= tolerance * np.abs(reference).max()


@pytest.mark.parametrize("rows, inputs, outputs", [(1, 7, 5), (5, 64, 33), (31, 100, 260), (32, 33, 47), (123, 530, 601)])
def test_linear(rows, inputs, outputs):
    compare(KERNELS.linear, torch.nn.functional.linear, draw(rows, inputs), draw(outputs, inputs), draw(outputs))


@pytest.mark.parametrize("rows", [3, 40])
def test_linear_with_bfloat16_weight(rows):
    """As the float32 numbers that they are; in training x may be rounded too, once."""
    weight, x = Tensor(draw(50, 71)).astype(ms.bfloat16), draw(rows, 71)
    values = weight.astype(ms.float32).asnumpy().astype(np.float64)
    assert np.abs(KERNELS.linear(Tensor(x), weight).asnumpy() - x @ values.T).max() < 1e-5
    training = CpuKernels(weights=ms.bfloat16).for_training()
    rounded = Tensor(x).astype(ms.bfloat16).astype(ms.float32).asnumpy().astype(np.float64)
    result = training.linear(Tensor(x), weight).asnumpy()
    assert min(np.abs(result - factor @ values.T).max() for factor in (x, rounded)) < 1e-5
    assert CpuKernels().for_training().linear(Tensor(x), Tensor(values.astype(np.float32))).asnumpy() == pytest.approx(
        x @ values.T, abs=1e-5)


@pytest.mark.parametrize("rows, inputs, outputs", [(33, 71, 50), (45, 129, 14), (123, 530, 601)])
def test_products_of_rounded_factors(rows, inputs, outputs):
    """Forward and backward as of factors that are rounded to bfloat16, where the machine multiplies these."""
    x, dy, weight = draw(rows, inputs), draw(rows, outputs), Tensor(draw(outputs, inputs)).astype(ms.bfloat16)
    w = weight.astype(ms.float32).asnumpy().astype(np.float64)
    if load_library().multiplies_bfloat16():
        a, b = (torch.tensor(factor).bfloat16().double().numpy() for factor in (x, dy))
    else:
        a, b = x.astype(np.float64), dy.astype(np.float64)
    linear = CpuKernels(weights=ms.bfloat16).for_training().operators.linear
    # Not by GradOperation, which rounds the weight's gradient at the end.
    gradients = linear.bprop(Tensor(x), weight, None, None, Tensor(dy))
    for mine, reference in zip([linear(Tensor(x), weight, None), *gradients[:2]], (a @ w.T, b @ w, b.T @ a)):
        assert np.abs(mine.asnumpy() - reference).max() <= 2e-6 * np.abs(reference).max()


@pytest.mark.parametrize("rows, inputs, outputs, rank, dropped", [
    (1, 7, 5, 3, True), (7, 100, 33, 16, False), (33, 71, 50, 5, True), (123, 530, 601, 16, False), (70, 129, 300, 40, True),
])
def test_adapted_linear(rows, inputs, outputs, rank, dropped):
    """A product with a LoRA adapter beside it, and the gradients of x and of the adapter."""
    weight, bias, a, b = draw(outputs, inputs), draw(outputs), draw(rank, inputs), draw(outputs, rank)
    mask = (draw(rows, inputs, seed=3) > -1).astype(np.float32) * 1.25 if dropped else None

    def theirs(x, a, b):
        inner = (x if mask is None else x * torch.tensor(mask)) @ a.T
        return x @ torch.tensor(weight).double().T + torch.tensor(bias) + 0.7 * inner @ b.T

    compare(lambda x, a, b: KERNELS.adapted_linear(x, Tensor(weight), Tensor(bias), a, b, 0.7,
                                                   None if mask is None else Tensor(mask)),
            theirs, draw(rows, inputs), a, b)


@pytest.mark.parametrize("rank", [4, 7])
def test_adapted_linear_beside_bfloat16(threads, rank):
    """What is rounded is the factors that a weight is multiplied by; the bits are those of any number of threads."""
    x, dy, a, b = draw(45, 71), draw(45, 50), draw(rank, 71), draw(50, rank)
    weight = Tensor(draw(50, 71)).astype(ms.bfloat16)
    adapted = CpuKernels(weights=ms.bfloat16).for_training().operators.adapted_linear

    def results():
        arguments = Tensor(x), weight, None, Tensor(a), Tensor(b), None, Tensor(0.5, ms.float32)
        dx, _, _, da, db, *_ = adapted.bprop(*arguments, None, Tensor(dy))
        return [tensor.asnumpy() for tensor in (adapted(*arguments), dx, da, db)]

    w = weight.astype(ms.float32).asnumpy().astype(np.float64)
    inner, dinner = 0.5 * x.astype(np.float64) @ a.T, 0.5 * dy.astype(np.float64) @ b
    found = results()
    for mine, reference, tolerance in zip(found, (x @ w.T + inner @ b.T, dy @ w + dinner @ a, dinner.T @ x, dy.T @ inner),
                                          (5e-3, 5e-3, 2e-6, 2e-6)):
        assert np.abs(mine - reference).max() <= tolerance * np.abs(reference).max()
    load_library().set_thread_count(2)
    assert all(np.array_equal(*pair) for pair in zip(found, results()))


def test_copy_rounded():
    """To the nearest, ties to even, infinities too: torch's bits. NaN stays NaN."""
    values = np.concatenate([draw(20000), np.float32([0, -0.0, np.inf, -np.inf, 1e-40, 3.4e38, 1 + 2 ** -8,
                                                      1 + 3 * 2 ** -8, 1 - 2 ** -9, np.nan])])
    target = Tensor(np.zeros(values.shape, np.float32)).astype(ms.bfloat16)
    KERNELS.copy_rounded(target, Tensor(values))
    bits, expected = target.view(ms.int16).asnumpy(), torch.tensor(values).bfloat16().view(torch.int16).numpy()
    assert np.array_equal(bits[:-1], expected[:-1]) and np.isnan(target.astype(ms.float32).asnumpy()[-1])


@pytest.mark.parametrize("rows, width", [(1, 5), (70, 40), (33, 513)])
def test_rms_norm(rows, width):
    compare(lambda x, w: KERNELS.rms_norm(x, w, 1e-5),
            lambda x, w: torch.nn.functional.rms_norm(x, (width,), w, 1e-5), draw(rows, width), draw(width))


@pytest.mark.parametrize("rows, width", [(1, 3), (37, 1001)])
def test_swiglu(rows, width):
    compare(KERNELS.swiglu, lambda gate, up: torch.nn.functional.silu(gate) * up, 3 * draw(rows, width), draw(rows, width, seed=2))


def test_swiglu_of_extremes():
    gate = np.array([[-np.inf, -200, -90, -87.4, 90, 200, np.nan, 0]], np.float32)
    result = KERNELS.swiglu(Tensor(gate), Tensor(np.ones_like(gate))).asnumpy()[0]
    assert np.isnan(result[[0, 6]]).all() and np.array_equal(result[4:6], [90, 200])
    assert np.abs(result[[1, 2, 3, 7]]).max() < 1e-35


@pytest.mark.parametrize("tables", [1, 2])
def test_rotate(tables):
    angles = draw(tables, 1, 5, 4)
    cos, sin = (np.tile(function(angles), (1, 1, 1, 2)) for function in (np.cos, np.sin))
    turn = torch.polar(torch.ones_like(torch.tensor(angles)), torch.tensor(angles)).transpose(1, 2)

    def theirs(x):
        turned = torch.complex(x[..., :4], x[..., 4:]) * turn
        return torch.cat((turned.real, turned.imag), -1)

    compare(lambda x: KERNELS.rotate(x, Tensor(cos), Tensor(sin)), theirs, draw(2, 5, 3, 8))


def test_heads_of_keys_and_values():
    for part in range(2):
        compare(lambda x: KERNELS.split_key_value(x, 7, 9)[part], lambda x: x.reshape(2, 7, 3, 2, 9)[:, :, :, part],
                draw(14, 54))
    keys, values = (KERNELS.split_key_value(Tensor(draw(14, 54)), 7, 9))
    assert np.array_equal(KERNELS.merge_key_value(keys, values).asnumpy(), draw(14, 54))


def attention(batch, length, heads, shared, dim, case):
    """Ours and torch's function of query, key and value, and their shapes."""
    config = TeleChatConfig(vocab_size=8, hidden_size=heads * 4, n_layer=1, n_head=heads, ffn_hidden_size=8,
                            position_embedding="alibi" if case == "alibi" else "rotary")
    padding = segment_ids = dropout = None
    bias = np.where(np.tri(length, dtype=bool), 0, -np.inf)[None, None] + np.zeros((batch, 1, 1, 1))
    if case == "padding":
        padding = np.arange(length) >= np.array([[0], [length // 3]])[:batch]
        bias = np.where(padding[:, None, None] | np.eye(length, dtype=bool), bias, -np.inf)
    if case == "documents":
        segment_ids = np.sort(np.random.default_rng(0).integers(0, 5, (batch, length)), 1)
        bias = np.where(segment_ids[:, None, :, None] == segment_ids[:, None, None], bias, -np.inf)
    if case == "alibi":
        distance = np.arange(length)[:, None] - np.arange(length)
        bias = bias - 2.0 ** (-8 * np.arange(1, heads + 1) / heads)[:, None, None] * distance
    mask = 1.0
    if case == "dropout":
        place = Place(2 ** 40 + 3, 5, range(7, 7 + batch), 2)
        mask = torch.tensor(dropout_mask(length, length, 0.2, place, range(heads)))
        dropout = KERNELS.attention_dropout(length, 0.2, place, range(heads))
    visible = KERNELS.attention_tensors(config, length, padding, segment_ids)

    def ours(query, key, value):
        return KERNELS.attention(query, key, value, *visible, 0.3, dropout)

    def theirs(query, key, value):
        key, value = (part.repeat_interleave(heads // shared, 2).transpose(1, 2) for part in (key, value))
        scores = query.transpose(1, 2) @ key.transpose(2, 3) * 0.3 + torch.tensor(bias)
        return ((torch.softmax(scores, -1) * mask) @ value).transpose(1, 2)

    return ours, theirs, [(batch, length, count, dim) for count in (heads, shared, shared)]


@pytest.mark.parametrize("batch, length, heads, shared, dim, case", [
    (1, 1, 1, 1, 4, "plain"), (2, 65, 4, 2, 20, "plain"), (1, 600, 2, 1, 64, "plain"), (2, 150, 4, 4, 36, "padding"),
    (2, 203, 2, 2, 16, "documents"), (1, 130, 4, 2, 24, "alibi"), (2, 131, 4, 2, 32, "dropout"),
])
def test_attention(batch, length, heads, shared, dim, case):
    ours, theirs, shapes = attention(batch, length, heads, shared, dim, case)
    compare(ours, theirs, *(draw(*shape, seed=place) for place, shape in enumerate(shapes)), tolerance=5e-6)


@pytest.mark.parametrize("width", [8, 70, 129])
def test_output_dropout(width):
    """The very masks that telechat/nn/dropout.py documents."""
    place = Place(2 ** 63 + 9, 2 ** 31, range(2, 5), 63)
    mask = KERNELS.output_dropout(7, width, 0.3, place, 0xFFFF)
    assert np.array_equal(mask.asnumpy(), dropout_mask(7, width, 0.3, place, [0xFFFF]).reshape(-1, width))


def test_cross_entropy():
    logits, labels = draw(6, 1003) * 30, np.array([0, 1002, 3, 3, 700, 1], np.int32)
    weights = np.array([.5, 0, 1, .25, 2, 0], np.float32)
    theirs = torch.tensor(logits, dtype=torch.float64, requires_grad=True)
    expected = torch.nn.functional.cross_entropy(theirs, torch.tensor(labels).long(), reduction="none") * torch.tensor(weights)
    expected.sum().backward()
    losses, gradient = KERNELS.token_cross_entropy(Tensor(logits), Tensor(labels), Tensor(weights))
    assert np.abs(losses.asnumpy() - expected.detach().numpy()).max() < 2e-5
    assert np.abs(gradient.asnumpy() - theirs.grad.numpy()).max() < 1e-6


def test_adamw():
    start, theirs = draw(41, 1000), torch.tensor(draw(41, 1000).astype(np.float64), requires_grad=True)
    optimizer = torch.optim.AdamW([theirs], lr=1e-2, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    parameter, first, second = Tensor(start), ops.zeros(start.shape), ops.zeros(start.shape)
    copy = ops.zeros(start.shape, ms.bfloat16)
    for step in range(1, 4):
        gradient = draw(41, 1000, seed=step)
        theirs.grad = torch.tensor(gradient.astype(np.float64))
        optimizer.step()
        scalars = KERNELS.adamw_scalars(step, 1e-2, (0.9, 0.95), 1e-8, 0.1)
        clip = Tensor(0.5, ms.float32)
        KERNELS.adamw(parameter, first, second, Tensor(2 * gradient), clip, *scalars[:-1], copy)
    assert np.abs(parameter.asnumpy() - theirs.detach().numpy()).max() < 1e-6
    assert np.array_equal(copy.asnumpy(), parameter.asnumpy().astype(copy.asnumpy().dtype))


def test_sums_of_squares(threads):
    """The same bits with any number of threads."""
    tensors = [draw(3, 50001), draw(7)]
    sums = KERNELS.sums_of_squares(*map(Tensor, tensors)).asnumpy()
    assert sums == pytest.approx([np.square(tensor.astype(np.float64)).sum() for tensor in tensors], rel=1e-6)
    load_library().set_thread_count(2)
    assert np.array_equal(sums, KERNELS.sums_of_squares(*map(Tensor, tensors)).asnumpy())


def test_bits_do_not_depend_on_threads(threads):
    """Neither a product's, nor attention's gradient, nor those of norms."""
    ours, _, shapes = attention(2, 131, 4, 2, 32, "dropout")
    heads = [Tensor(draw(*shape)) for shape in shapes]
    x, weight, norm = Tensor(draw(300, 130)), Tensor(draw(77, 130)), Tensor(draw(130))

    def results():
        gradient = ops.GradOperation(get_all=True, sens_param=True)
        parts = [*gradient(ours)(*heads, Tensor(draw(*shapes[0], seed=1))), KERNELS.linear(x, weight),
                 *gradient(lambda a, b: KERNELS.rms_norm(a, b, 1e-5))(x, norm, x)]
        return [part.asnumpy() for part in parts]

    first = results()
    load_library().set_thread_count(2)
    for one, other in zip(first, results()):
        assert np.array_equal(one, other)


def test_misaligned_tensors():
    """Parts of tensors begin anywhere."""
    x, weight = draw(40, 33), draw(34, 33)
    memory = Tensor(np.concatenate([[0], weight.reshape(-1)]).astype(np.float32))
    part = memory[1:].reshape(34, 33)
    assert np.abs(KERNELS.linear(Tensor(x), part).asnumpy() - x @ weight.T.astype(np.float64)).max() < 1e-5


def test_a_forked_process_computes_too(threads):
    """Its parent's threads are not there; it makes its own."""
    masks = np.ones((1, 6), np.int32)
    expected = dropout_masks(masks, 64, 64)
    child = os.fork()
    if child == 0:
        os._exit(0 if np.array_equal(dropout_masks(masks, 64, 64), expected) else 1)
    for _ in range(100):
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            break
        time.sleep(0.1)
    else:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    assert done and status == 0


@pytest.mark.parametrize("threads", [1, 2], indirect=True)
@pytest.mark.parametrize("dtype", [ms.float32, ms.bfloat16])
def test_embedding(threads, dtype):
    """Rows of the table to the bit; of its gradient the float64 sums of the rows that a token stands in."""
    table, dx = Tensor(draw(2100, 37)).astype(dtype), draw(9, 37)
    ids = np.array([0, 5, 2099, 5, 1024, 5, 1023, 2048, 0], np.int32)
    rows = KERNELS.embedding(Tensor(ids), table, ms.float32).asnumpy()
    assert np.array_equal(rows, table.astype(ms.float32).asnumpy()[ids])
    expected = np.zeros((2100, 37))
    np.add.at(expected, ids, dx.astype(np.float64))
    assert np.abs(KERNELS.embedding_gradient(Tensor(dx), Tensor(ids), table).asnumpy() - expected).max() < 1e-6


@pytest.mark.parametrize("rounded", [False, True])
@pytest.mark.parametrize("rows, inputs, outputs", [(5, 7, (3, 9)), (45, 130, (70, 33)), (2100, 2100, (9, 33))])
def test_linear_pair(rows, inputs, outputs, rounded, threads):
    """The very numbers of two products by themselves; the gradients of x added up. In the last case x is packed in parts."""
    pair, one = CpuKernels(rounded=rounded), CpuKernels(rounded=rounded)
    x, *weights = [Tensor(draw(*shape, seed=shape[0])) for shape in ((rows, inputs), *((o, inputs) for o in outputs))]
    dys = tuple(Tensor(draw(rows, o, seed=o)) for o in outputs)
    made = pair.linear_pair(x, *weights)
    dx, *dweights = ops.GradOperation(get_all=True, sens_param=True)(pair.operators.linear_pair)(x, *weights, dys)
    alone = [ops.GradOperation(get_all=True, sens_param=True)(one.linear)(x, weight, dy) for weight, dy in zip(weights, dys)]
    for y, weight, dweight, (_, expected) in zip(made, weights, dweights, alone):
        assert np.array_equal(y.asnumpy(), one.linear(x, weight).asnumpy())
        assert np.array_equal(dweight.asnumpy(), expected.asnumpy())
    expected = alone[0][0].asnumpy() + alone[1][0].asnumpy()
    assert np.abs(dx.asnumpy() - expected).max() < 1e-5 * np.abs(expected).max()


@pytest.mark.parametrize("counted, vocabulary", [(0, 19), (7, 19), (5, 2 ** 22 - 3)])
def test_head_loss(counted, vocabulary):
    """By float64; of a vocabulary of 4 million logits are made in three parts of the rows that count."""
    labels = np.array([0, vocabulary - 1, 3, 3, 7, 1, 1], np.int32)
    weights = np.where(np.arange(7) < counted, np.array([.5, 0, 1, .25, 2, 1, 1]), 0).astype(np.float32)
    x, head = draw(7, 3), draw(vocabulary, 3)
    theirs, their_head = (torch.tensor(array, dtype=torch.float64, requires_grad=True) for array in (x, head))
    expected = torch.nn.functional.cross_entropy(0.5 * theirs @ their_head.T, torch.tensor(labels).long(), reduction="none")
    (expected * torch.tensor(weights)).sum().backward()
    inputs = [Tensor(array) for array in (x, head, labels, weights)]
    losses, dx, dhead = KERNELS.head_loss(*inputs, 0.5)
    assert np.abs(losses.asnumpy() - (expected * torch.tensor(weights)).detach().numpy()).max() < 2e-5
    assert np.abs(dx.asnumpy() - theirs.grad.numpy()).max() < 2e-5  # a sum over the vocabulary
    assert np.abs(dhead.asnumpy() - their_head.grad.numpy()).max() < 1e-6
    for ours, frozen in zip((losses, dx), KERNELS.head_loss(*inputs, 0.5, frozen=True)):
        assert np.array_equal(ours.asnumpy(), frozen.asnumpy())
