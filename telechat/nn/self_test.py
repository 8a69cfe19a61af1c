"""A few seconds' test of a device's kernels: results and gradients against formulas in float64."""

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn, ops

from telechat.nn.dropout import Place, dropout_mask

TOLERANCE = {ms.float32: 1e-4, ms.float16: 1e-2, ms.bfloat16: 5e-2}  # of the largest value
_STEP = 1e-5  # of the finite differences
# Short prompts: where heads lie before tokens, Ascend's rotation takes at most 8·tokens heads of all sequences.
_FEW_TOKENS, _SEQUENCES, _MANY_HEADS = 2, 2, 20
_PLACE = Place(seed=1, step=2, sequences=(3,), layer=4)  # of dropout


class _Case:
    """A kernel, its formula, and inputs."""

    def __init__(self, name, formula, call, *arrays, tables=None):
        self.name = name
        self.formula = formula
        self.call = call  # kernels, the tables and the inputs → the result
        self.arrays = arrays
        self.tables = tables  # what the call is given besides the inputs


class _Compiled(nn.Cell):
    """A case as a compiled graph, and its gradient."""

    def __init__(self, call, kernels, tables):
        super().__init__()
        self.call, self.kernels, self.tables = call, kernels, tables
        self.gradient = ops.GradOperation(get_all=True, sens_param=True)

    def apply(self, *inputs):
        return self.call(self.kernels, self.tables, *inputs)

    @ms.jit
    def construct(self, *inputs):
        return self.apply(*inputs)

    @ms.jit
    def backward(self, dresult, *inputs):
        return self.gradient(self.apply)(*inputs, dresult)


def _cases(kernels, dim, length):
    random = np.random.default_rng(0)
    scale = dim ** -0.5
    rate = 1 - kernels.keep_prob

    def draw(*shape):
        return random.standard_normal(shape).astype(np.float32)

    heads = 2
    angles = draw(max(length, _FEW_TOKENS), dim // 2).astype(np.float64)
    cos, sin = (np.tile(function(angles), (1, 2)).astype(np.float32) for function in (np.cos, np.sin))

    def norm(x, weight):
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-5) * weight

    def swiglu(gate, up):
        return gate / (1 + np.exp(-gate)) * up

    def rotate(x, rows=length):
        heads = x.reshape(-1, rows, x.shape[1] // dim, dim)
        turned = np.concatenate([-heads[..., dim // 2:], heads[..., :dim // 2]], -1)
        return (heads * cos[:rows, None] + turned * sin[:rows, None]).reshape(x.shape)

    segment_ids = (np.arange(length) >= length * 3 // 8).astype(np.int32)  # two in a row
    same_document = segment_ids[:, None] == segment_ids

    def attend(query, key, value, kept=1.0, seen=True):
        query, key, value = (x.reshape(length, heads, dim).transpose(1, 0, 2) for x in (query, key, value))
        scores = query @ key.transpose(0, 2, 1) * scale + np.where(np.tri(length, dtype=bool) & seen, 0, -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights *= kept / weights.sum(-1, keepdims=True)
        return (weights @ value).transpose(1, 0, 2).reshape(length, -1)

    def rotary_tables(rows):
        return tuple(kernels.rotary_tensor(table[None, None, :rows]) for table in (cos, sin))

    def call_rotate(kernels, tables, x):
        return kernels.merge_heads(kernels.rotate(kernels.split_heads(x, tables[0].shape[2], dim), *tables))

    def call_attend(kernels, tables, query, key, value):
        visible, dropped = tables
        query, key = kernels.split_heads(query, length, dim), kernels.split_heads(key, length, dim)
        attended = kernels.attention(query, key, kernels.split_heads(value, length, dim), *visible, scale, dropped)
        return kernels.merge_heads(attended)

    def visible(**more):
        return kernels.attention_tensors(_Shape(heads), length, **more)

    def call_product(kernels, _, x, weight):
        return kernels.linear(x, weight)

    def call_norm(kernels, _, x, weight):
        return kernels.rms_norm(x, weight, 1e-5)

    def call_swiglu(kernels, _, gate, up):
        return kernels.swiglu(gate, up)

    size = (length, heads * dim)
    cases = [
        _Case("product", lambda x, w: x @ w.T, call_product, draw(*size), draw(24, size[1])),
        _Case("norm", norm, call_norm, draw(*size), draw(size[1])),
        _Case("SwiGLU", swiglu, call_swiglu, draw(*size), draw(*size)),
        _Case("rotation", rotate, call_rotate, draw(*size), tables=rotary_tables(length)),
        _Case("short rotation", lambda x: rotate(x, _FEW_TOKENS), call_rotate,
              draw(_SEQUENCES * _FEW_TOKENS, _MANY_HEADS * dim), tables=rotary_tables(_FEW_TOKENS)),
        _Case("attention", attend, call_attend, draw(*size), draw(*size), draw(*size), tables=(visible(), None)),
        _Case("documents", lambda q, k, v: attend(q, k, v, seen=same_document), call_attend, draw(*size), draw(*size),
              draw(*size), tables=(visible(segment_ids=segment_ids[None]), None)),
    ]
    if rate:
        dropped = kernels.attention_dropout(length, rate, _PLACE, range(heads))
        kept = kept_factors(dropped, length, rate, _PLACE, range(heads))[0]
        cases.append(_Case("dropout", lambda q, k, v: attend(q, k, v, kept), call_attend, draw(*size), draw(*size),
                           draw(*size), tables=(visible(dropout=True), dropped)))
    return cases


def kept_factors(dropped, length, rate, place, heads):
    """What `Kernels.attention_dropout` gave, as factors of the probabilities: float64 (B, n, S, S).

    Bits of a card's own generator hold 1 where a probability is kept and multiplied by 1/(1 − rate).
    """
    if isinstance(dropped, Tensor) and dropped.dtype == ms.uint8:
        bits = np.unpackbits(dropped.asnumpy(), axis=-1, bitorder="little")
        return bits / (1 - rate)
    if isinstance(dropped, Tensor) and dropped.dtype == ms.float32:
        return dropped.asnumpy().astype(np.float64)
    return dropout_mask(length, length, rate, place, heads).astype(np.float64)


class _Loss(nn.Cell):
    """Cross entropy of tokens as a compiled graph."""

    def __init__(self, kernels):
        super().__init__()
        self.kernels = kernels

    @ms.jit
    def construct(self, logits, labels, weights):
        return self.kernels.token_cross_entropy(logits, labels, weights)


def _loss_errors(kernels, rows=64, vocab_size=1000):
    """Errors of the losses and of the gradient that comes with them, of their largest values."""
    random = np.random.default_rng(2)
    logits, weights = random.standard_normal((rows, vocab_size)), random.random(rows).astype(np.float32)
    labels = random.integers(0, vocab_size, rows).astype(np.int32)
    given = Tensor(logits.astype(np.float32)).astype(kernels.dtype)
    logits = given.astype(ms.float32).asnumpy().astype(np.float64)
    powers = np.exp(logits - logits.max(-1, keepdims=True))
    probabilities = powers / powers.sum(-1, keepdims=True)
    losses = -np.log(probabilities[np.arange(rows), labels]) * weights
    gradient = (probabilities - (np.arange(vocab_size) == labels[:, None])) * weights[:, None]
    found = _Loss(kernels)(given, Tensor(labels), Tensor(weights))
    return [float(np.abs(ours.astype(ms.float32).asnumpy() - theirs).max() / np.abs(theirs).max())
            for ours, theirs in zip(found, (losses, gradient))]


class _Shape:
    """What `Kernels.attention_tensors` reads of a config."""

    position_embedding = "rotary"

    def __init__(self, heads):
        self.n_head = heads


def check_kernels(kernels, dim=16, length=16):
    """Try each kernel of `Kernels` inside a compiled graph, with heads of size ``dim`` over ``length`` tokens.

    Attention with dropout is among them where the kernels' ``keep_prob`` is below 1; ``length`` is a multiple of 8 then.

    Yields:
        (name, error of the result, error of the gradients, allowed): errors relative to the largest
        value; the gradients' along one direction, against central differences of the formula. Last the loss, whose
        gradient comes with it, in float32.
    """
    random = np.random.default_rng(1)
    for case in _cases(kernels, dim, length):
        # The inputs as the kernel sees them, rounded to its dtype.
        tensors = [Tensor(array).astype(kernels.dtype) for array in case.arrays]
        arrays = [tensor.astype(ms.float32).asnumpy().astype(np.float64) for tensor in tensors]
        expected = case.formula(*arrays)
        weights = Tensor(random.standard_normal(expected.shape).astype(np.float32)).astype(kernels.dtype)
        factors = weights.astype(ms.float32).asnumpy().astype(np.float64)

        compiled = _Compiled(case.call, kernels, case.tables)
        result = compiled(*tensors).astype(ms.float32).asnumpy()
        error = np.abs(result - expected).max() / np.abs(expected).max()
        gradients = compiled.backward(weights, *tensors)
        worst = 0.0
        for place, gradient in enumerate(gradients):
            direction = random.standard_normal(arrays[place].shape)
            moved = [[array + sign * _STEP * direction if index == place else array
                      for index, array in enumerate(arrays)] for sign in (1, -1)]
            slope = ((case.formula(*moved[0]) - case.formula(*moved[1])) * factors).sum() / (2 * _STEP)
            gradient = gradient.astype(ms.float32).asnumpy().astype(np.float64)
            scale = np.sqrt((gradient ** 2).sum() * (direction ** 2).sum() / direction.size)
            worst = max(worst, abs((gradient * direction).sum() - slope) / scale)
        yield case.name, float(error), float(worst), TOLERANCE[kernels.dtype]
    yield "loss", *_loss_errors(kernels), TOLERANCE[ms.float32]
