"""A few seconds' test of a device's kernels: results and gradients against formulas in float64."""

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn, ops

TOLERANCE = {ms.float32: 1e-4, ms.float16: 1e-2, ms.bfloat16: 5e-2}  # of the largest value
_STEP = 1e-5  # of the finite differences


class _Case:
    """A kernel, its formula, and inputs."""

    def __init__(self, name, formula, call, *arrays, tables=None):
        self.name = name
        self.formula = formula
        self.call = call  # kernels, the tables and the inputs → the result
        self.arrays = arrays
        self.tables = tables  # kernels → what the call is given besides the inputs, made outside the graph


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


def _cases(dim, length):
    random = np.random.default_rng(0)
    scale = dim ** -0.5

    def draw(*shape):
        return random.standard_normal(shape).astype(np.float32)

    heads = 2
    angles = draw(length, dim // 2).astype(np.float64)
    cos, sin = (np.tile(function(angles), (1, 2)).astype(np.float32) for function in (np.cos, np.sin))

    def norm(x, weight):
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-5) * weight

    def swiglu(gate, up):
        return gate / (1 + np.exp(-gate)) * up

    def split(x):
        return x.reshape(length, heads, dim)

    def rotate(x):
        x = split(x)
        turned = np.concatenate([-x[..., dim // 2:], x[..., :dim // 2]], -1)
        return (x * cos[:, None] + turned * sin[:, None]).reshape(length, -1)

    def attend(query, key, value):
        query, key, value = map(split, (query, key, value))
        scores = np.einsum("qhd,khd->hqk", query, key) * scale + np.where(np.tri(length), 0, -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        return np.einsum("hqk,khd->qhd", weights, value).reshape(length, -1)

    def rotary_tables(kernels):
        return tuple(kernels.rotary_tensor(table[None, None]) for table in (cos, sin))

    def call_rotate(kernels, tables, x):
        return kernels.merge_heads(kernels.rotate(kernels.split_heads(x, length, dim), *tables))

    def call_attend(kernels, visible, query, key, value):
        query, key = kernels.split_heads(query, length, dim), kernels.split_heads(key, length, dim)
        attended = kernels.attention(query, key, kernels.split_heads(value, length, dim), *visible, scale)
        return kernels.merge_heads(attended)

    def call_product(kernels, _, x, weight):
        return kernels.linear(x, weight)

    def call_norm(kernels, _, x, weight):
        return kernels.rms_norm(x, weight, 1e-5)

    def call_swiglu(kernels, _, gate, up):
        return kernels.swiglu(gate, up)

    size = (length, heads * dim)
    return [
        _Case("product", lambda x, w: x @ w.T, call_product, draw(*size), draw(24, size[1])),
        _Case("norm", norm, call_norm, draw(*size), draw(size[1])),
        _Case("SwiGLU", swiglu, call_swiglu, draw(*size), draw(*size)),
        _Case("rotation", rotate, call_rotate, draw(*size), tables=rotary_tables),
        _Case("attention", attend, call_attend, draw(*size), draw(*size), draw(*size),
              tables=lambda kernels: kernels.attention_tensors(_Shape(heads), length)),
    ]


class _Shape:
    """What `Kernels.attention_tensors` reads of a config."""

    position_embedding = "rotary"

    def __init__(self, heads):
        self.n_head = heads


def check_kernels(kernels, dim=16, length=16):
    """Try each kernel of `Kernels` inside a compiled graph, with heads of size ``dim`` over ``length`` tokens.

    Yields:
        (name, error of the result, error of the gradients, allowed): errors relative to the largest
        value; the gradients' along one direction, against central differences of the formula.
    """
    random = np.random.default_rng(1)
    for case in _cases(dim, length):
        # The inputs as the kernel sees them, rounded to its dtype.
        tensors = [Tensor(array).astype(kernels.dtype) for array in case.arrays]
        arrays = [tensor.astype(ms.float32).asnumpy().astype(np.float64) for tensor in tensors]
        expected = case.formula(*arrays)
        weights = Tensor(random.standard_normal(expected.shape).astype(np.float32)).astype(kernels.dtype)
        factors = weights.astype(ms.float32).asnumpy().astype(np.float64)

        compiled = _Compiled(case.call, kernels, None if case.tables is None else case.tables(kernels))
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
