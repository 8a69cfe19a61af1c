"""The computing kernels as fused Ascend operations; `telechat.nn.kernels` says what each computes.

None of them runs on a CPU: there only their graphs can be compiled (tests/ascend).
"""

import mindspore as ms
from mindspore import Tensor, mint, ops
from mindspore.ops import auto_generate

from telechat.nn.flash_attention import flash_attention
from telechat.nn.flash_tensors import with_filler
from telechat.nn.paged_attention import paged_attention, write_cache

_matmul = ops.MatMul(transpose_b=True)
_dense = auto_generate.Dense()
_cross_entropy = auto_generate.CrossEntropyLoss()
_cross_entropy_gradient = auto_generate.CrossEntropyLossGrad()
_adamw = auto_generate.AdamW()
_vector_norm = auto_generate.LinalgVectorNorm()
_dropout_bits = auto_generate.DropoutGenMaskExt()
_apply_bits = auto_generate.DropoutDoMaskExt()
# Cosine format 2: both halves of a row equal, rotate-half.
_rotate_pair = auto_generate.ApplyRotaryPosEmb(2)
_split = ops.Split(-1, 2)
_AS_MASKED, _CAUSAL = 0, 2  # sparse_mode


def linear(x, weight, bias):
    """One operation, the bias included.

    Without a bias a MatMul: the gradient of Dense would transpose its arguments in operations of their own.
    """
    weight = weight.astype(x.dtype)
    return _matmul(x, weight) if bias is None else _dense(x, weight, bias.astype(x.dtype))


def rms_norm(x, weight, epsilon):
    """RmsNorm; its second result is for the gradient."""
    return ops.rms_norm(x, weight, epsilon)[0]


def add_rms_norm(x, delta, weight, epsilon):
    """AddRmsNorm. Only for inference: the gradient that MindSpore gives it leaves that of the sum out."""
    normed, _, total = auto_generate.add_rms_norm(x, delta, weight, epsilon)
    return normed, total


def swiglu(gate, up):
    """Swiglu, which takes both in one tensor."""
    return ops.swiglu(ops.concat((gate, up), -1), -1)


def rotate(x, cos, sin):
    """RotaryPositionEmbedding in mode 0, rotate-half; all of one dtype."""
    return ops.rotary_position_embedding(x, cos, sin, 0)


def attention(query, key, value, mask, position_bias, ends, scale, dropout, keep_prob):
    """FlashAttentionScore over (B, S, heads, D); with the segments' ends over all tokens in a row."""
    keep_prob = 1.0 if dropout is None else keep_prob
    if ends is None:
        sparse_mode = _CAUSAL if len(mask.shape) == 2 else _AS_MASKED
        return flash_attention(query, key, value, scale, "BSND", mask, sparse_mode, position_bias, dropout, keep_prob)
    attended = flash_attention(with_filler(query, ends), with_filler(key, ends),
                               with_filler(value, ends), scale, "TND", mask, _CAUSAL, ends=ends)
    return attended[:query.shape[0] * query.shape[1]].reshape(query.shape)


def dropout_bits(rows, columns, rate, keys, dtype):
    """DropoutGenMask: a mask for each of ``keys``, the seeds of the device's generator, as bits, 1 keeps.

    Returns uint8 (len(keys), rows·columns / 8), which must be whole bytes; dtype is that of what will be dropped.
    Outside compiled graphs.
    """
    size, offset = rows * columns, Tensor(0, ms.int64)
    # The operation fills up to a multiple of 128 bits.
    return ops.stack([_dropout_bits((size,), rate, Tensor(key, ms.int64), offset, dtype)[:size // 8] for key in keys])


def dropout_mask(rows, columns, rate, keys, dtype):
    """The same as numbers, 1/(1 − rate) or 0: (len(keys), rows, columns) in ``dtype``."""
    ones, offset = ops.ones((rows, columns), dtype), Tensor(0, ms.int64)
    return ops.stack([_apply_bits(ones, _dropout_bits((rows * columns,), rate, Tensor(key, ms.int64), offset, dtype), rate)
                      for key in keys])


def token_cross_entropy(logits, labels, weights):
    """CrossEntropyLoss and its gradient operation."""
    labels = labels.astype(ms.int64)
    losses, log_probabilities, _, _ = _cross_entropy(logits.astype(ms.float32), labels, None, "none", -100, 0.0, 0.0,
                                                     False)
    gradient = _cross_entropy_gradient(weights, log_probabilities, labels, None, None, None, "none", -100, 0.0, 0.0)
    return losses * weights, gradient


def adamw_scalars(updates, rate, betas, epsilon, decay):
    """The operation adds 1 to the step, a tensor of one element: mint.optim.AdamW, which calls it, starts at 0."""
    return [Tensor([updates - 1], ms.float32), *map(float, (rate, *betas, epsilon, decay, 0.0))]


def adamw(parameter, first_moment, second_moment, gradient, step, rate, beta1, beta2, epsilon, decay):
    """AdamW, bias correction included; its fourth tensor is for amsgrad alone."""
    return _adamw(parameter, first_moment, second_moment, second_moment, gradient, step, rate, beta1, beta2, decay,
                  epsilon, False, False)


def sums_of_squares(tensors):
    """LinalgVectorNorm of each, added up in float32; outside graphs, which take longer to be given so many tensors.

    Joined by aclnnStack, which takes any number; ops.stack is an operation of the old kind.
    """
    norms = mint.stack([_vector_norm(tensor, 2, None, False, ms.float32) for tensor in tensors])
    return norms * norms


def rotate_token(query, key, cos, sin, lengths):
    """ApplyRotaryPosEmb: (B, n·D) and (B, m·D), cos and sin (B, D)."""
    return _rotate_pair(query, key, cos, sin, lengths)


def cached_attention(query, key_value, rotation, caches, places, scale):
    """Rotation, ReshapeAndCache and PagedAttention."""
    slots, table, lengths = places
    key_cache, value_cache, keys, values = caches
    heads, dim = key_cache.shape[2:]
    key, value = _split(key_value.reshape(-1, heads, 2 * dim))
    key, value = key.reshape(-1, heads * dim), value.reshape(-1, heads * dim)
    if rotation is not None:
        query, key = rotate_token(query, key, *rotation, lengths)
    written = write_cache(key_cache, value_cache, key, value, slots)
    return paged_attention(ops.depend(query, written), keys, values, table, lengths, scale)
