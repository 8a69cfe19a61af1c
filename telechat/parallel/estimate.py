"""What a run needs of each rank, derived from the shapes alone: parameters, memory.

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
# An update makes the clipped gradient and three results of AdamW, in float32.
_UPDATE_COPIES = 4
# Fitted to peaks measured on CPU (benchmarks/memory.py): what the backward graphs of a block's halves hold at once
# beyond their inputs and results, as multiples of the attention scores (float32) and of one activation of the
# attention's width, and of one of the feed-forward width; and how many float32 copies of lower weights and their
# gradients.
_SCORES, _HIDDEN, _INNER = 4, 12, 10
_CASTS = 4
_LOGIT_COPIES = 3  # likewise of the head's graph, as multiples of a chunk of float32 logits
# Of a CPU process that trains a negligible model: MindSpore, its compiler, the graphs' code, and what tools/train.py
# draws curves and asks questions with. Measured: 530 MB of the steps alone, 620 with curves, 746 with questions.
FRAMEWORK = 650_000_000


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
        """In how many parts the logits of a micro-batch are made, where every token counts."""
        return -(-self.tokens(parallel) // self.logit_rows(self.tokens(parallel)))


@dataclasses.dataclass(frozen=True)
class Memory:
    """One rank's memory.

    ``parts`` is what is there at the peak and adds up to it. The fields before it are each at its own largest, so
    that their sum is more: not everything is there at the same time.
    """

    parameters: int  # a number, the rows that fill up the vocabulary included
    weights: int
    gradients: int
    optimizer: int  # moments and, where they are copies, float32 master weights
    activations: int  # kept between forward and backward passes, all micro-batches under way together
    logits: int  # a chunk of them, and the head's gradients that are at work with it
    held: int  # what compiled graphs hold on to of their last call
    work: int  # of a block's graphs, the update or the reduction of gradients: the largest of them
    peak: int
    peak_phase: str  # "head", "backward", "reduce gradients" or "update"
    parts: dict  # name → bytes


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
    masks = score_elements(model, parallel, workload) if workload.mask_padding and not workload.scores_at_once else 0
    masks //= 1 if model.position_embedding == "alibi" else model.n_head // parallel.tensor
    return under_way * (layers * layer + masks * FLOAT32) + (sent + last) * hidden


def score_elements(model, parallel, workload):
    """How many attention scores are made at a time: sequences · heads · S², or by blocks."""
    scores = workload.scores_at_once or workload.sequence_length ** 2
    return workload.sequences(parallel) * model.n_head // parallel.tensor * scores


def dropout_bytes(model, parallel, workload):
    """Float32 dropout masks of one layer: of the scores, of the two outputs, and of what an adapter is given."""
    scores = score_elements(model, parallel, workload) if model.attention_dropout else 0
    hidden = 2 * workload.kept_tokens(parallel) * model.hidden_size if model.hidden_dropout else 0
    return FLOAT32 * (scores + hidden + workload.tokens(parallel) * workload.adapter_dropout)


def index_tables(model, parallel, workload, stage):
    """Tables that MindSpore's CPU kernels keep for as long as a graph exists; 0 on other devices.

    An elementwise kernel that broadcasts keeps the positions of both operands, 8 bytes each, for every
    element of its result. The kernels tile small operands instead; only the graph of a head that is cut over
    ranks has 2 such kernels at the logits. A sum of bfloat16 keeps them even without broadcasting; with operators of
    our own there is none.
    """
    if not workload.on_cpu:
        return 0
    vocabulary = vocabulary_rows(model, parallel.tensor) if stage == parallel.pipeline - 1 else 0
    total = 2 * workload.logit_rows(workload.tokens(parallel)) * vocabulary * (parallel.tensor > 1)
    if workload.gradient_bytes < FLOAT32:
        many = workload.micro_batches > 1
        total += vocabulary * model.hidden_size * ((workload.chunks(parallel) > 1) + many)
        total += elements(stage_parts(model, parallel, stage).block) * many
    return 16 * total


def stage_memory(model, parallel, workload, stage):
    """`Memory` of a rank in pipeline stage ``stage``.

    Without fragmentation, the buffers of collectives and, on a card, the framework's own. A compiled graph holds the
    arguments of its last call until its next one: measured on CPU (benchmarks/memory.py compares the whole), assumed
    elsewhere.

    Args:
        model (TeleChatConfig): the whole model.
        parallel (ParallelConfig): with ``data`` filled in; must have passed `check_mesh`.
        workload (Workload): the step.
        stage (int): 0 to pipeline − 1.
    """
    parts, width = stage_parts(model, parallel, stage), workload.weight_bytes
    trained, frozen = trained_parts(model, parallel, workload, stage), workload.adapter is not None
    wide, own = workload.activation_bytes, workload.own_operators
    last, many = stage == parallel.pipeline - 1, workload.micro_batches > 1
    gradient_width = workload.gradient_bytes
    embedding, block, head = (elements(shapes) * gradient_width for shapes, _ in trained.groups)
    groups = embedding + block + head
    gradients = embedding + trained.layers * block + head
    weights = parts.parameters * width + (trained.parameters * FLOAT32 if frozen else 0)
    optimizer = optimizer_bytes(trained, parallel, FLOAT32 if frozen else width)
    one_reduced = [gradient_width * sum(_reduced(shape, parallel, workload) for shape in shapes)
                   for shapes, _ in trained.groups]
    reduced = sum(size * count for size, (_, count) in zip(one_reduced, trained.groups))
    kept = activation_bytes(model, parallel, workload, stage)

    hidden = workload.kept_tokens(parallel) * model.hidden_size * wide
    layer = layer_activations(model, parallel, workload)
    logits = _head_bytes(model, parallel, workload) if last else 0
    head_gradient = 0 if frozen else vocabulary_rows(model, parallel.tensor) * model.hidden_size * gradient_width
    chunks = workload.chunks(parallel)

    # Of their last call, the update's graph holds the gradients of one tensor group of each kind, the sums of
    # micro-batches two such sets, those of the head's chunks two of its gradients, a block's backward pass
    # what a layer keeps.
    held = 0
    if not own:
        held += sum(one_reduced)
        twice = last and stage == 0 and model.tie_word_embeddings and not frozen  # its gradient is a sum always
        held += 2 * groups if many else 2 * embedding if twice else 0
        held += 2 * head_gradient if last and chunks > 1 else 0
    held += layer + 4 * hidden + 2 * dropout_bytes(model, parallel, workload)

    work = _block_work(model, parallel, workload, elements(parts.block))
    if parallel.recompute:  # all but gate and up, which the backward graph makes for itself
        work += layer - 2 * workload.tokens(parallel) * block_shape(model, parallel.tensor).ffn_hidden_size * wide
    backward = work + (2 * block if many else block)
    largest = max(math.prod(shape) for shapes, _ in trained.groups for shape in shapes)
    update = 0 if own else largest * FLOAT32 * (_UPDATE_COPIES + (width < FLOAT32 and not frozen))
    summed = gradients if many else 0
    left = reduced if parallel.data > 1 else gradients
    # Phase → activations, gradients and work at its fullest moment. The backward pass has two: its first layer finds
    # all activations, its last one all gradients.
    phases = {
        "head": [(kept, summed, logits)],
        "backward": [(kept, summed or head_gradient * last, backward),
                     (0, gradients, backward - (0 if many else block))],
        "reduce gradients": [(0, gradients, reduced if parallel.data > 1 else 0)],
        "update": [(0, left, update)],
    }
    phase, (activations, there, working) = max(
        ((name, moment) for name, moments in phases.items() for moment in moments), key=lambda item: sum(item[1]))
    tables = index_tables(model, parallel, workload, stage) + _constants(model, parallel, workload)
    at_peak = {"weights": weights, "optimizer": optimizer, "gradients": there, "activations": activations,
               "work": working, "held": held, "tables": tables, "framework": FRAMEWORK if workload.on_cpu else 0}
    return Memory(parts.parameters, weights, gradients, optimizer, kept, logits, held,
                  max(backward, update, reduced if parallel.data > 1 else 0), sum(at_peak.values()), phase, at_peak)


def _reduced(shape, parallel, workload):
    """Numbers of a gradient that a rank keeps after the reduction over data-parallel ranks.

    On CPU a scatter is a view of the whole sum.
    """
    return math.prod(shape) // (parallel.data if is_cut(shape, parallel) and not workload.on_cpu else 1)


def _head_bytes(model, parallel, workload):
    """The head at work: float32 logits of a chunk, gradients of head and input of up to four of its calls."""
    tokens, rows = workload.tokens(parallel), vocabulary_rows(model, parallel.tensor)
    chunk = workload.logit_rows(tokens)
    calls = 1 if workload.chunks(parallel) == 1 else 4
    gradient = 0 if workload.adapter else calls * rows * model.hidden_size * workload.gradient_bytes
    if workload.casts:
        gradient += _casts(workload) * rows * model.hidden_size * workload.activation_bytes
    return (gradient + _LOGIT_COPIES * chunk * rows * FLOAT32
            + (calls + parallel.sequence_parallel) * tokens * model.hidden_size * workload.activation_bytes)


def _block_work(model, parallel, workload, parameters):
    """The larger of what the backward graphs of a block's halves hold at once, besides arguments, results and gradients.

    The feed-forward layer goes by ``rows_at_once``.
    """
    share, wide = block_shape(model, parallel.tensor), workload.activation_bytes
    tokens, scores = workload.tokens(parallel), score_elements(model, parallel, workload) * FLOAT32
    attention = _SCORES * scores + _HIDDEN * tokens * share.n_head * share.head_dim * wide
    feed_forward = _INNER * min(tokens, workload.rows_at_once or tokens) * share.ffn_hidden_size * wide
    cast = _casts(workload) * parameters * wide if workload.casts else 0
    return max(attention, feed_forward) + cast + dropout_bytes(model, parallel, workload)


def _casts(workload):
    """How many copies of lower weights and their gradients, in the activations' dtype, a graph makes: of frozen ones half."""
    return _CASTS // 2 if workload.adapter else _CASTS


def _constants(model, parallel, workload):
    """The causal mask, or what a block of queries needs of it, and the rotary tables."""
    masks = model.n_head // parallel.tensor if model.position_embedding == "alibi" else 1
    scores = workload.scores_at_once or workload.sequence_length ** 2
    return FLOAT32 * (masks * scores + workload.sequence_length * 2 * model.head_dim)
