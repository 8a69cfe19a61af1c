"""A few seconds' test of a device's kernels: results and gradients against formulas in float64."""

import mindspore as ms
import numpy as np
from mindspore import Tensor, ops

TOLERANCE = {ms.float32: 1e-4, ms.float16: 1e-2, ms.bfloat16: 5e-2}  # of the largest value
_STEP = 1e-5  # of the finite differences


class _Case:
    """A kernel, its formula, and inputs."""

    def __init__(self, name, formula, call, *arrays):
        self.name = name
        self.formula = formula
        self.call = call
        self.arrays = arrays


def _cases():
    random = np.random.default_rng(0)

    def draw(*shape):
        return random.standard_normal(shape).astype(np.float32)

    heads, length, dim = 2, 16, 16
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
        scores = np.einsum("qhd,khd->hqk", query, key) / 4 + np.where(np.tri(length), 0, -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        return np.einsum("hqk,khd->qhd", weights, value).reshape(length, -1)

    def call_rotate(kernels, x):
        tables = (kernels.rotary_tensor(table[None, None]) for table in (cos, sin))
        return kernels.merge_heads(kernels.rotate(kernels.split_heads(x, length, dim), *tables))

    def call_attend(kernels, *parts):
        visible = kernels.attention_tensors(_Shape(heads), length)
        parts = [kernels.split_heads(part, length, dim) for part in parts]
        return kernels.merge_heads(kernels.attention(*parts, *visible, 0.25))

    size = (length, heads * dim)
    return [
        _Case("product", lambda x, w: x @ w.T, lambda kernels, x, w: kernels.linear(x, w), draw(*size), draw(24, 32)),
        _Case("norm", norm, lambda kernels, x, w: kernels.rms_norm(x, w, 1e-5), draw(*size), draw(32)),
        _Case("SwiGLU", swiglu, lambda kernels, g, u: kernels.swiglu(g, u), draw(*size), draw(*size)),
        _Case("rotation", rotate, call_rotate, draw(*size)),
        _Case("attention", attend, call_attend, draw(*size), draw(*size), draw(*size)),
    ]


class _Shape:
    """What `Kernels.attention_tensors` reads of a config."""

    position_embedding = "rotary"

    def __init__(self, heads):
        self.n_head = heads


def check_kernels(kernels):
    """Try each kernel of `Kernels`.

    Yields:
        (name, error of the result, error of the gradients, allowed): errors relative to the largest
        value; the gradients' along one direction, against central differences of the formula.
    """
    random = np.random.default_rng(1)
    for case in _cases():
        # The inputs as the kernel sees them, rounded to its dtype.
        tensors = [Tensor(array).astype(kernels.dtype) for array in case.arrays]
        arrays = [tensor.astype(ms.float32).asnumpy().astype(np.float64) for tensor in tensors]
        expected = case.formula(*arrays)
        weights = Tensor(random.standard_normal(expected.shape).astype(np.float32)).astype(kernels.dtype)
        factors = weights.astype(ms.float32).asnumpy().astype(np.float64)

        def function(*inputs, call=case.call):
            return call(kernels, *inputs)

        result = function(*tensors).astype(ms.float32).asnumpy()
        error = np.abs(result - expected).max() / np.abs(expected).max()
        gradients = ops.GradOperation(get_all=True, sens_param=True)(function)(*tensors, weights)
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
