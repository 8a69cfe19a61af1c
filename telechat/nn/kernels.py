"""The seam between the model and the device: what each kernel computes.

`Kernels` has one method a kernel, with its contract, those over a cache in cache_kernels.py, and computes by operations
that every device has (portable_kernels.py). `AscendKernels` (ascend.py) puts fused Ascend operations in their
place, `CpuKernels` (cpu/kernels.py) operators of our own for CPUs. kernel_choice.py decides once for a model. Beside
parallel/collectives.py these alone ask for the device.
"""

import os

import mindspore as ms
from mindspore import Tensor, ops

from telechat.nn import portable_kernels as portable
from telechat.nn.blockwise_attention import BlockwiseAttention, causal_blocks, dropout_blocks, is_long
from telechat.nn.cache_kernels import CacheKernels
from telechat.nn.cores import own_cores
from telechat.nn.device import device_tensor, on_cpu
from telechat.nn.dropout import dropout_mask
from telechat.nn.positions import causal_mask
from telechat.nn.quantised import dequantise, in_order, portable_tensors

ROWS_AT_ONCE = 2048  # of a feed-forward layer
# Logits made at a time in training, as rows × vocabulary. On a CPU 16 MB in float32, so that a chunk stays near the
# caches while its products are still large; on a card 512 MB: each chunk adds a whole gradient of the head.
LOGITS_ON_CPU, LOGITS_ON_CARD = 2 ** 22, 2 ** 27
LAUNCHING_THREADS = 8  # a process's own and those of MindSpore's that spin beside it: five queues and what runs graphs

_gradient = ops.GradOperation(get_all=True, sens_param=True)


def choose_launching_thread():
    """Let graphs run in the thread that calls them, on a CPU and on a card whose host has few cores.

    Else threads of MindSpore's hand work to each other and spin while they wait, which takes a tenth of a CPU's work
    (benchmarks/tried.md); with two cores a card's launches take three times as long (benchmarks/more.md). Where there are
    cores to spin on, Python runs ahead of the launches. MindSpore reads it when the first operation runs, and never again:
    so it is decided on import, and again when a model's kernels are chosen, by when a program may have chosen the CPU.
    """
    if on_cpu() or own_cores() < LAUNCHING_THREADS:
        os.environ.setdefault("MS_DEV_HOST_BLOCKING_RUN", "1")


choose_launching_thread()


def device_name():
    """What computes, in words."""
    target = ms.get_context("device_target")
    if on_cpu():
        return f"{target}, {os.cpu_count()} cores"
    return f"{target}: {ms.hal.device_count()} of {ms.hal.get_device_name(0)}"


class Kernels(CacheKernels):
    """The kernels of one model. Made by `choose_kernels` (kernel_choice.py); N is the number of rows, B·S.

    Args:
        dtype: of the activations.
        keep_prob (float): 1 − the rate of attention dropout.

    Attributes:
        fused (bool): whether these are `AscendKernels`.
        flash (bool): attention over whole sequences by FlashAttentionScore.
        paged (bool): decoding by ReshapeAndCache and PagedAttention.
    """

    fused = False
    has_head_loss = False  # whether there is `head_loss`; else HeadLoss makes logits, a chunk of rows at a time
    copied_dtype = None  # of working weights that `adamw` writes itself; others are `copy_rounded`'s
    in_graphs = True  # whether what is done to gradients goes through compiled graphs, which hold on to them

    def __init__(self, dtype=ms.float32, keep_prob=1.0):
        super().__init__(dtype)
        self.keep_prob = keep_prob
        self.for_cpu = on_cpu()  # with what only MindSpore's CPU backend needs
        self.blockwise_attention = BlockwiseAttention()
        self.rows_at_once = ROWS_AT_ONCE
        self.logits_at_once = LOGITS_ON_CPU if on_cpu() else LOGITS_ON_CARD

    def describe(self):
        """Which implementation each kernel has, as one line."""
        return "attention portable, decoding portable, all else portable"

    def require_device(self):
        """InputError where Ascend operations were chosen and this device has none."""

    def for_training(self):
        """The kernels that train a model whose answers these compute; the same, unless training may be less exact."""
        return self

    def embeds_in_graphs(self, dtype):
        """Whether `embedding` of a table in ``dtype`` may be part of a compiled graph."""
        return not (self.for_cpu and dtype == ms.bfloat16)

    def embedding(self, input_ids, weight, dtype):
        """Rows of ``weight`` (V, H) for int32 ``input_ids`` (N,): (N, H) in ``dtype``."""
        if not self.embeds_in_graphs(weight.dtype):
            return portable.embedding_of_bits(input_ids, weight, dtype)
        return portable.embedding(input_ids, weight, dtype)

    def embedding_gradient(self, dx, input_ids, weight):
        """The gradient of ``weight`` (V, H) from that of what `embedding` gives, (N, H)."""
        return ops.unsorted_segment_sum(dx, input_ids, weight.shape[0])

    def linear(self, x, weight, bias=None):
        """x (N, in), weight (out, in), bias (out,) or None → x·weightᵀ + bias, (N, out) in x's dtype.

        In the place of a weight there may be the tuple of a quantised one (quantised.py).
        """
        if isinstance(weight, tuple):
            return self.quantised_linear(x, weight, bias)
        return portable.linear(x, weight, bias)

    def linear_pair(self, x, first, second):
        """`linear` of one x with each of two weights, without bias."""
        return self.linear(x, first), self.linear(x, second)

    def adapted_linear(self, x, weight, bias, a, b, scale, mask=None):
        """`linear` with a LoRA adapter, in training: x·weightᵀ + bias + scale·((x ⊙ mask)·aᵀ)·bᵀ.

        a (r, in), b (out, r): float32, as what is trained; weight and bias are frozen, and have no gradient that counts.
        mask (N, in): of dropout, or None.
        """
        return self.linear(x, weight, bias) + self.low_rank(x, a, b, scale, mask)

    def low_rank(self, x, a, b, scale, mask=None):
        """What `adapted_linear` adds."""
        return self.linear(self.linear(x if mask is None else x * mask.astype(x.dtype), a) * scale, b)

    def quantised_tensors(self, weight):
        """A `QuantisedWeight`'s values and scales as `quantised_linear` takes them, two Tensors on the host."""
        return portable_tensors(weight)

    def quantised_linear(self, x, weight, bias=None):
        """`linear` with the tuple of a quantised weight, which is dequantised for this product alone."""
        return self.linear(in_order(x, weight), dequantise(weight, x.shape[1]), bias)

    def add_bias(self, x, bias):
        """x (N, H) + bias (H,); x where bias is None."""
        return portable.add_bias(x, bias)

    def rms_norm(self, x, weight, epsilon):
        """RMSNorm (arXiv:1910.07467) of x (N, H) with weight (H,); statistics in float32, x's dtype out."""
        return portable.rms_norm(x, weight, epsilon)

    def add_rms_norm(self, x, delta, weight, epsilon):
        """RMSNorm of x + delta, and the sum; (N, H) each. For inference: it has no gradient."""
        total = x + delta
        return self.rms_norm(total, weight, epsilon), total

    def swiglu(self, gate, up):
        """SiLU(gate)·up (arXiv:2002.05202), elementwise."""
        return portable.swiglu(gate, up)

    def rotary_tensor(self, table):
        """A float32 table of `rotary_tables` as the tensor that `rotate` takes."""
        return device_tensor(table)

    def rotate(self, x, cos, sin):
        """Rotary positions in the rotate-half form (arXiv:2104.09864).

        x as `split_heads` gives it; cos and sin (1 or B, 1, S, D), both halves of D equal.
        """
        return portable.rotate(x, cos, sin)

    def split_heads(self, x, length, dim):
        """(B·S, n·dim) → (B, n, S, dim), or (B, S, n, dim) where attention wants it so."""
        return portable.split_heads(x, length, dim)

    def split_key_value(self, x, length, dim):
        """(B·S, m·2·dim), [k|v] head by head, → keys and values as `split_heads` gives heads."""
        return portable.split_key_value(x, length, dim)

    def merge_key_value(self, key, value):
        """The inverse of `split_key_value`."""
        return portable.merge_key_value(key, value)

    def merge_heads(self, x):
        """The inverse of `split_heads`: (B·S, n·dim)."""
        return portable.merge_heads(x)

    def attention_tensors(self, config, length, padding=None, segment_ids=None, heads=slice(None), dropout=False):
        """What `attention` needs to know of the tokens, in three parts, each None where there is nothing to say.

        Args:
            config (TeleChatConfig): position bias and number of heads.
            length (int): S.
            padding (array): (B, S), 0 for pads, which no token sees; None for no padding.
            segment_ids (array): int (B, S), tokens attend to those of the same number only; None for
                one sequence a row.
            heads (slice): the heads computed here.
            dropout (bool): whether `attention` will be given dropout masks.

        Returns:
            (mask, position_bias, segment_ids). Portable: the additive mask, float32 (1 or B, 1 or n, S, S), or for long
            sequences `BlockMasks` of it, and two times None. Flash: those of `flash_tensors`.
        """
        if self.goes_by_blocks(length, dropout):
            return causal_blocks(config, length, padding, segment_ids, heads), None, None
        return device_tensor(causal_mask(config, length, padding, segment_ids, heads)), None, None

    def goes_by_blocks(self, length, dropout=False):
        """Whether attention over ``length`` tokens goes by blocks of queries: in float32 only, as a CPU computes."""
        return self.dtype == ms.float32 and is_long(length)

    def attention_dropout(self, length, rate, place, heads):
        """Dropout masks of some heads over sequences of ``length`` tokens, as `attention` takes them; None for rate 0.

        place (Place): with heads as its streams. (B, n, S, S) in float32, `BlockMasks` of them where attention goes by
        blocks, or for flash attention bits.
        """
        if rate and self.goes_by_blocks(length, dropout=True):
            return dropout_blocks(length, rate, place, heads)
        return _tensor(dropout_mask(length, length, rate, place, heads))

    def output_dropout(self, length, width, rate, place, stream):
        """A mask of activations (B·S, width), 1/(1 − rate) where they are kept and 0 elsewhere; None for rate 0."""
        mask = _tensor(dropout_mask(length, width, rate, place, [stream]))
        return None if mask is None else mask.reshape(-1, width)

    def attention(self, query, key, value, mask, position_bias, segment_ids, scale, dropout=None):
        """softmax(scale·query·keyᵀ + bias)·value over the tokens that each one may see.

        Args:
            query (Tensor): n heads as `split_heads` gives them.
            key, value (Tensor): m heads likewise, where n is a multiple of m (grouped heads).
            mask, position_bias, segment_ids: of `attention_tensors`; in a compiled graph tensors alone.
            scale (float): usually D^(−1/2).
            dropout (Tensor): of `attention_dropout`, multiplied into the probabilities; None for none.

        Returns:
            Tensor: query's shape and dtype; softmax in float32.
        """
        if not isinstance(mask, Tensor):
            return self.blockwise_attention(query, key, value, mask, scale, dropout)
        return portable.attention(query, key, value, mask, scale, dropout)

    def attention_in_training(self, query, key, value, mask, position_bias, segment_ids, scale, dropout=None):
        """`attention` of tensors with its heads merged, (B·S, n·D), and what `attention_backward` may take besides.

        That is the logarithm of each row's sum of exponentials, float32 (B, n, S), or None.
        """
        return self.merge_heads(self.attention(query, key, value, mask, position_bias, segment_ids, scale, dropout)), None

    def attention_backward(self, dattended, attended, query, key, value, log_sums, mask, position_bias, segment_ids, scale,
                           dropout=None):
        """The gradients of query, key and value, from that of ``attended``: as `attention_in_training` gave it."""
        dresult = self.split_heads(dattended, query.shape[1 if self.flash else 2], query.shape[3])
        return _gradient(self.attention)(query, key, value, mask, position_bias, segment_ids, scale, dropout, dresult)[:3]

    def token_cross_entropy(self, logits, labels, weights):
        """Weighted cross entropies of tokens, and the gradient of their sum in the logits.

        Args:
            logits (Tensor): (N, V), any float dtype; computed in float32.
            labels (Tensor): int32 (N,), each in [0, V).
            weights (Tensor): float32 (N,); 0 leaves a token out.

        Returns:
            (Tensor, Tensor): the weighted losses, float32 (N,); the gradient, (N, V) in float32.
        """
        return portable.token_cross_entropy(logits, labels, weights)

    def head_loss(self, x, head, labels, weights, scale, frozen=False):
        """`token_cross_entropy` of the logits scale·x·headᵀ, which are never there all at once; where `has_head_loss`.

        Args:
            x, head (Tensor): (N, H), (V, H).
            labels, weights: as there; N may be any number, and rows at the end without weight cost nothing.
            frozen (bool): whether no gradient of ``head`` is wanted.

        Returns:
            The weighted losses, float32 (N,); the gradients of their sum in x and, unless ``frozen``, in head, float32.
        """
        raise NotImplementedError

    def adamw_scalars(self, updates, rate, betas, epsilon, decay):
        """The arguments of `adamw` after the tensors, for the ``updates``-th update, 1 first.

        Returns:
            list: step, rate, beta1, beta2, epsilon, decay, and the decay of what has none.
        """
        return portable.adamw_scalars(updates, rate, betas, epsilon, decay)

    def adamw(self, parameter, first_moment, second_moment, gradient, clip, step, rate, beta1, beta2, epsilon, decay,
              copy=None):
        """One step of torch's AdamW (arXiv:1711.05101) in place on float32 tensors of one shape.

        The gradient, of any float dtype, is multiplied by ``clip``, float32 (1,), first, on Ascend unless that is None.
        Scalars behind it are those of `adamw_scalars`. Returns something to depend on. copy, where it is given, is a
        tensor of the `copied_dtype` that the rounded result is to be written to as well.
        """
        gradient = gradient.astype(ms.float32) * clip
        return portable.adamw(parameter, first_moment, second_moment, gradient, step, rate, beta1, beta2, epsilon, decay)

    def copy_rounded(self, target, source):
        """Write the float32 tensor ``source`` into ``target``, of its shape and any float dtype; outside graphs."""
        target.copy_(source)

    def sums_of_squares(self, *tensors):
        """Sums of squares, float32, which add up to those of all tensors; the bits are the same in every run."""
        return portable.sums_of_squares(tensors, self.for_cpu)


def _tensor(array):
    return None if array is None else device_tensor(array)
