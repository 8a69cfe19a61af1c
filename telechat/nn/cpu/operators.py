"""The operators for CPUs as MindSpore's graphs and gradients take them."""

import ctypes
import functools

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn, ops

from telechat.nn.cpu.build import library_path, load_library

NOTHING = Tensor(np.zeros((1, 1, 1), np.float32))  # how an operator is told that there is none


def _or_nothing(tensor):
    return NOTHING if tensor is None else tensor


@functools.lru_cache(None)
def _operator(name, shapes, count=1):
    """The operator ``name``: ``shapes`` gives its outputs' shapes, all float32, from those of its inputs alone.

    MindSpore takes operators of one name for the same, whatever else they would give.
    """
    dtypes = ms.float32 if count == 1 else (ms.float32,) * count
    return ops.Custom(f"{library_path()}:{name}", out_shape=shapes, out_dtype=lambda *_: dtypes, func_type="aot")


def _product_shape(x, weight, *others):
    return [x[0], weight[0]]


def _weight_of(packed, scales, x):
    return [packed[0], x[1]]


def _input_shape(dy, weight, rounded):
    return [dy[0], weight[1]]


def _weight_shape(dy, x, rounded):
    return [dy[1], x[1]]


def _pair_shapes(x, first, second, rounded):
    return [x[0], first[0]], [x[0], second[0]]


def _pair_gradients(dy, other_dy, x, first, second, rounded):
    return x, first, second


def _adapted_gradients(dy, x, weight, rounded, a, b, *others):
    return x, a, b


def _columns(x):
    return [x[1]]


def _first(first, *others):
    return first


def _norm_gradients(dy, x, weight, epsilon):
    return x, weight


def _first_two(dy, gate, up):
    return gate, up


def _attended(query, *others):
    batch, length, heads, dim = query
    return [batch * length, heads * dim], [batch, heads, length]


def _attention_gradients(dy, y, query, key, value, *others):
    return query, key, value


def _loss_shapes(logits, labels, weights):
    return labels, logits


def _head_loss_shapes(x, head, labels, *others):
    return labels, x, head


def _frozen_head_loss_shapes(x, head, labels, *others):
    return labels, x


def _rows_of_table(ids, table):
    return [ids[0], table[1]]


def _table_shape(dx, ids, table):
    return table


def dropout_masks(descriptions, rows, columns):
    """Masks, a float32 array (count, rows, columns), from their descriptions, int32 (count, 6)."""
    masks = np.empty((len(descriptions), rows, columns), np.float32)
    sizes = map(ctypes.c_int64, masks.shape)
    load_library().dropout_masks(ctypes.c_void_p(descriptions.ctypes.data), *sizes, ctypes.c_void_p(masks.ctypes.data))
    return masks


@functools.lru_cache(None)
def _dtype_name(dtype):
    return str(dtype).lower().encode()


def run_now(name, *tensors):
    """Call the operator ``name`` on tensors that are there, its outputs the last of them; outside graphs alone.

    A graph would hold on to all of them until its next call. An address waits for what still computes its tensor.
    """
    shapes = [(ctypes.c_int64 * tensor.ndim)(*tensor.shape) for tensor in tensors]
    count = len(tensors)
    status = getattr(load_library(), name)(
        count, (ctypes.c_void_p * count)(*(tensor.data_ptr() for tensor in tensors)),
        (ctypes.c_int * count)(*map(len, shapes)),
        (ctypes.c_void_p * count)(*map(ctypes.addressof, shapes)),
        (ctypes.c_char_p * count)(*(_dtype_name(tensor.dtype) for tensor in tensors)), None, None)
    if status:
        raise RuntimeError(f"the operator {name} gave status {status}")


class Linear(nn.Cell):
    """x (N, in)·weight (out, in)ᵀ + bias: x float32, weight float32 or bfloat16, its gradient in float32.

    rounded (bool): factors are rounded to bfloat16 where the machine multiplies these; sums are float32.
    """

    def __init__(self, rounded):
        super().__init__()
        self.rounded = Tensor([float(rounded)], ms.float32)
        self.product = _operator("linear", _product_shape)
        self.input_gradient = _operator("linear_input_gradient", _input_shape)
        self.weight_gradient = _operator("linear_weight_gradient", _weight_shape)
        self.column_sums = _operator("column_sums", _columns)

    def construct(self, x, weight, bias):
        return self.product(x, weight, _or_nothing(bias), self.rounded)

    def bprop(self, x, weight, bias, out, dout):
        dbias = None if bias is None else self.column_sums(dout)
        return self.input_gradient(dout, weight, self.rounded), self.weight_gradient(dout, x, self.rounded), dbias


class LinearPair(nn.Cell):
    """x (N, in)·weightᵀ of two weights, (out, in) each with outputs of its own, as of `Linear` without bias."""

    def __init__(self, rounded):
        super().__init__()
        self.rounded = Tensor([float(rounded)], ms.float32)
        self.products = _operator("linear_pair", _pair_shapes, 2)
        self.gradient = _operator("linear_pair_gradient", _pair_gradients, 3)

    def construct(self, x, first, second):
        return self.products(x, first, second, self.rounded)

    def bprop(self, x, first, second, out, dout):
        return self.gradient(dout[0], dout[1], x, first, second, self.rounded)


class AdaptedLinear(nn.Cell):
    """x·weightᵀ + bias + scale·((x ⊙ mask)·aᵀ)·bᵀ: `Linear` with the LoRA factors a (r, in) and b (out, r), float32.

    mask float32 (N, in) or None; scale float32 (). Weight and bias are frozen: what is given for their gradients is none.
    """

    def __init__(self, rounded):
        super().__init__()
        self.rounded = Tensor([float(rounded)], ms.float32)
        self.product = _operator("adapted_linear", _product_shape)
        self.gradient = _operator("adapted_linear_gradient", _adapted_gradients, 3)

    def construct(self, x, weight, bias, a, b, mask, scale):
        return self.product(x, weight, _or_nothing(bias), self.rounded, a, b, _or_nothing(mask), scale)

    def bprop(self, x, weight, bias, a, b, mask, scale, out, dout):
        dx, da, db = self.gradient(dout, x, weight, self.rounded, a, b, _or_nothing(mask), scale)
        return dx, weight, bias, da, db, mask, scale


class Dequantise(nn.Cell):
    """The float32 weight (out, in) of packed values and scales (../quantised.py), for x (N, in); it has no gradient."""

    def __init__(self):
        super().__init__()
        self.dequantise = _operator("dequantise", _weight_of)

    def construct(self, packed, scales, x):
        return self.dequantise(packed, scales, x)

    def bprop(self, packed, scales, x, out, dout):
        return packed, scales, ops.zeros_like(x)


class RmsNorm(nn.Cell):
    """RMSNorm of x (N, H), float32, with weight (H,)."""

    def __init__(self):
        super().__init__()
        self.norm = _operator("rms_norm", _first)
        self.gradient = _operator("rms_norm_gradient", _norm_gradients, 2)

    def construct(self, x, weight, epsilon):
        return self.norm(x, weight, epsilon)

    def bprop(self, x, weight, epsilon, out, dout):
        return *self.gradient(dout, x, weight, epsilon), epsilon


class Swiglu(nn.Cell):
    """SiLU(gate)·up, float32 of one shape."""

    def __init__(self):
        super().__init__()
        self.swiglu = _operator("swiglu", _first)
        self.gradient = _operator("swiglu_gradient", _first_two, 2)

    def construct(self, gate, up):
        return self.swiglu(gate, up)

    def bprop(self, gate, up, out, dout):
        return self.gradient(dout, gate, up)


class Rotate(nn.Cell):
    """x (B, S, n, D) by cos and sin (1 or B, 1, S, D): float32, no gradient in the tables."""

    def __init__(self):
        super().__init__()
        self.rotate = _operator("rotate", _first)

    def construct(self, x, cos, sin):
        return self.rotate(x, cos, sin)

    def bprop(self, x, cos, sin, out, dout):
        return self.rotate(dout, cos, -sin), cos, sin


class Attend(nn.Cell):
    """Causal attention: query (B, S, n, D), key and value (B, S, m, D) → (B·S, n·D), and each row's logarithm (B, n, S).

    segments int32 (1 or B, S): tokens see those of the same number only; slopes float32 (n,): ALiBi's; dropout: of
    `CpuKernels.attention_dropout`; each None for none. scale float32 (1,). The logarithms have no gradient.
    """

    def __init__(self):
        super().__init__()
        self.attend = _operator("attention", _attended, 2)
        self.gradient = _operator("attention_gradient", _attention_gradients, 3)

    def construct(self, query, key, value, segments, slopes, dropout, scale):
        return self.attend(query, key, value, _or_nothing(segments), _or_nothing(slopes), _or_nothing(dropout), scale)

    def backward(self, dattended, attended, query, key, value, logarithms, segments, slopes, dropout, scale):
        """The gradients of query, key and value."""
        return self.gradient(dattended, attended, query, key, value, logarithms, _or_nothing(segments),
                             _or_nothing(slopes), _or_nothing(dropout), scale)

    def bprop(self, query, key, value, segments, slopes, dropout, scale, out, dout):
        gradients = self.backward(dout[0], out[0], query, key, value, out[1], segments, slopes, dropout, scale)
        return *gradients, segments, slopes, dropout, scale


class Operators(nn.Cell):
    """All of them: what has a gradient as a Cell, the others as they are. rounded: as of `Linear`."""

    def __init__(self, rounded):
        super().__init__()
        self.linear, self.linear_pair, self.adapted_linear = Linear(rounded), LinearPair(rounded), AdaptedLinear(rounded)
        self.rms_norm, self.swiglu = RmsNorm(), Swiglu()
        self.rotate, self.attend = Rotate(), Attend()
        self.quantised_linear, self.dequantise = _operator("quantised_linear", _product_shape), Dequantise()
        self.cross_entropy = _operator("cross_entropy", _loss_shapes, 2)
        self.head_loss = _operator("head_loss", _head_loss_shapes, 3)
        self.frozen_head_loss = _operator("frozen_head_loss", _frozen_head_loss_shapes, 2)
        self.embedding = _operator("embedding", _rows_of_table)
        self.embedding_gradient = _operator("embedding_gradient", _table_shape)
