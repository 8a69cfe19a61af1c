"""What a run needs of each rank, derived from the shapes alone: parameters, optimizer, activations.

Activation memory is counted as Korthikanti et al. do, "Reducing Activation Recomputation in Large
Transformer Models" (arXiv:2205.05198), section 4: each tensor that lives between a forward and a
backward pass, divided by the tensor-parallel size where it is cut. Which tensors those are is this
implementation's own: the inputs of a block's products (telechat/nn/block_graphs.py). The optimizer's share is
that of ZeRO stage 1 (Rajbhandari et al., arXiv:1910.02054). Sizes are in bytes unless a name says otherwise.
"""

import dataclasses
import math
import typing

from telechat.parallel.plan import block_shape, local_slices, stage_layers, vocabulary_rows

FLOAT32 = 4
# Copies of the largest product's weight that dequantising it makes in a graph, at the graph's fullest; and of all of a
# layer's by portable operations on a CPU, whose graphs give little back (measured: 10 with 4 bits, 5 with 8).
_DEQUANTISED, _DEQUANTISED_PORTABLE = 4, 10


@dataclasses.dataclass(frozen=True)
class Workload:
    """What is computed in a step, and how wide its numbers are."""

    sequence_length: int
    batch_size: int  # sequences a step, all ranks and micro-batches together
    micro_batches: int
    weight_bytes: int  # of a working weight: 4 or 2
    activation_bytes: int
    logit_rows: typing.Callable  # logit_rows(N) → how many of N rows of logits are made at a time
    mask_padding: bool = False
    scores_at_once: int = None  # attention's, of one head and sequence; None: all S²
    rows_at_once: int = None  # rows of a feed-forward layer at a time (nn/block_graphs.py); None: all
    on_cpu: bool = False  # MindSpore's CPU kernels keep tables of their own, see `index_tables`
    # Those of nn/cpu: attention keeps a number a head and token for the backward pass, lower weights' gradients are
    # float32, updates happen in place and outside graphs.
    own_operators: bool = False
    adapter: dict = None  # name → shape of a layer's adapter, float32, where it is trained and all weights are frozen
    adapter_dropout: int = 0  # columns of its dropout masks
    flash: bool = False  # attention by FlashAttentionScore, which makes no scores (nn/flash_attention.py)
    product_bytes: typing.Callable = None  # product_bytes(shape) of a quantised product; None: they are not

    @property
    def gradient_bytes(self):
        """Of a number of a trained tensor's gradient."""
        return FLOAT32 if self.own_operators or self.adapter else self.weight_bytes

    @property
    def casts(self):
        """Whether graphs make float32 copies of weights."""
        return self.activation_bytes > self.weight_bytes and not self.own_operators

    def sequences(self, parallel):
        """Sequences of a micro-batch on one rank."""
        return self.batch_size // (self.micro_batches * parallel.data)

    def tokens(self, parallel):
        """Tokens of a micro-batch on one rank."""
        return self.sequences(parallel) * self.sequence_length

    def kept_tokens(self, parallel):
        """Of these, the rows that a rank keeps of the norm and residual regions."""
        return self.tokens(parallel) // (parallel.tensor if parallel.sequence_parallel else 1)

    def chunks(self, parallel):
        """In how many calls the logits of a micro-batch are made, where every token counts: by own operators in one."""
        if self.own_operators and parallel.tensor == 1:
            return 1
        return -(-self.tokens(parallel) // self.logit_rows(self.tokens(parallel)))


@dataclasses.dataclass(frozen=True)
class StageParts:
    """Shapes of a rank's parameters in one pipeline stage, in the groups that are updated together."""

    embedding: list
    block: list
    layers: int
    head: list

    @property
    def groups(self):
        """(shapes, how often) of each group."""
        return (self.embedding, 1), (self.block, self.layers), (self.head, 1)

    @property
    def parameters(self):
        """How many numbers they hold."""
        return sum(elements(shapes) * count for shapes, count in self.groups)


def elements(shapes):
    """How many numbers tensors of these shapes hold."""
    return sum(math.prod(shape) for shape in shapes)


def stage_parts(model, parallel, stage):
    """`StageParts` of pipeline stage ``stage`` (every tensor-parallel rank holds as much)."""
    hidden, share = model.hidden_size, block_shape(model, parallel.tensor)
    heads, key_values = (count * share.head_dim for count in (share.n_head, 2 * share.num_key_value_heads))
    inner = share.ffn_hidden_size
    vocabulary = (vocabulary_rows(model, parallel.tensor), hidden)
    bias = [(hidden,)] if model.use_bias else []
    block = [(hidden,), (heads, hidden), (key_values, hidden), (hidden, heads), *bias,
             (hidden,), (inner, hidden), (inner, hidden), (hidden, inner), *bias]
    first, last = stage == 0, stage == parallel.pipeline - 1
    tied = model.tie_word_embeddings
    return StageParts([vocabulary] if first or (last and tied) else [], block,
                      len(stage_layers(model, parallel)[stage]),
                      ([(hidden,)] if last else []) + ([vocabulary] if last and not tied else []))


def weight_bytes(parts, workload):
    """Bytes of the working weights of `StageParts`."""
    total = parts.parameters * workload.weight_bytes
    if workload.product_bytes is not None:
        products = [shape for shape in parts.block if len(shape) == 2]
        total += parts.layers * sum(workload.product_bytes(shape) - workload.weight_bytes * math.prod(shape) for shape in products)
    return total


def dequantised_bytes(parts, workload):
    """What is there of quantised products as float32 weights while a layer's graphs compute with them."""
    if workload.product_bytes is None:
        return 0
    if workload.on_cpu and not workload.own_operators:
        return _DEQUANTISED_PORTABLE * FLOAT32 * elements([shape for shape in parts.block if len(shape) == 2])
    return _DEQUANTISED * FLOAT32 * max(math.prod(shape) for shape in parts.block)


def trained_parts(model, parallel, workload, stage):
    """The same of what is trained: all of `stage_parts`, or an adapter's tensors alone."""
    parts = stage_parts(model, parallel, stage)
    if workload.adapter is None:
        return parts
    own = [tuple(part.stop - part.start for part in local_slices(name, shape, 0, parallel.tensor))
           for name, shape in workload.adapter.items()]
    return StageParts([], own, parts.layers, [])


def is_cut(shape, parallel):
    """Whether the optimizer's state of a parameter is cut over the data-parallel ranks (optimizer.py)."""
    return parallel.shard_optimizer and parallel.data > 1 and shape[0] % parallel.data == 0


def optimizer_bytes(parts, parallel, weight_bytes):
    """Two float32 moments, and a float32 master weight where it is not the parameter itself."""
    total = 0
    for shapes, count in parts.groups:
        for shape in shapes:
            cut = is_cut(shape, parallel)
            copies = 3 if cut or weight_bytes < FLOAT32 else 2
            total += count * math.prod(shape) * copies * FLOAT32 // (parallel.data if cut else 1)
    return total


def layer_activations(model, parallel, workload):
    """What one layer keeps of one micro-batch without recomputation: the inputs of its products.

    That is x and the second residual (rows, H), cut by sequence parallelism; queries, keys and values,
    attention's result, gate and up, cut by tensor parallelism; and a number a head by operators of our own.
    """
    share = block_shape(model, parallel.tensor)
    cut = share.head_dim * 2 * (share.n_head + share.num_key_value_heads) + 2 * share.ffn_hidden_size
    cut += share.n_head if workload.own_operators else 0
    return workload.activation_bytes * (2 * workload.kept_tokens(parallel) * model.hidden_size
                                        + workload.tokens(parallel) * cut)


def activation_bytes(model, parallel, workload, stage):
    """What a stage keeps between forward and backward passes.

    For every micro-batch under way, with 1F1B at most as many as stages follow plus its own
    (arXiv:2104.04473, section 2.2): what each layer keeps, or with recomputation its input alone, and
    the stage's output. Sent tensors are kept to the end of the step.
    """
    hidden = workload.kept_tokens(parallel) * model.hidden_size * workload.activation_bytes
    layer = hidden if parallel.recompute else layer_activations(model, parallel, workload)
    layers = len(stage_layers(model, parallel)[stage])
    first, last = stage == 0, stage == parallel.pipeline - 1
    under_way = min(parallel.pipeline - stage, workload.micro_batches)
    sent = workload.micro_batches * ((not last) + (not first))
    made = workload.scores_at_once is None and not workload.flash
    masks = score_elements(model, parallel, workload) if workload.mask_padding and made else 0
    masks //= 1 if model.position_embedding == "alibi" else model.n_head // parallel.tensor
    return under_way * (layers * layer + masks * FLOAT32) + (sent + last) * hidden


def score_elements(model, parallel, workload):
    """How many attention scores are made at a time: sequences · heads · S², or by blocks."""
    scores = workload.scores_at_once or workload.sequence_length ** 2
    return workload.sequences(parallel) * model.n_head // parallel.tensor * scores
