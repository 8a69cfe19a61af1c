"""The peak of a training step's memory on a CPU, from shapes alone: what its graphs hold at once. Sizes are in bytes."""

import math

from telechat.parallel.estimate import (FLOAT32, activation_bytes, dequantised_bytes, elements, layer_activations, score_elements,
                                        stage_parts, trained_parts)
from telechat.parallel.plan import block_shape, vocabulary_rows

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


class CpuStep:
    """The moments of a training step at which a process may be fullest; they were measured by benchmarks/memory.py.

    Args:
        model (TeleChatConfig), parallel (ParallelConfig), workload (Workload), stage (int): as of `stage_memory`.
    """

    def __init__(self, model, parallel, workload, stage):
        self.model, self.parallel, self.workload, self.stage = model, parallel, workload, stage
        self.parts = stage_parts(model, parallel, stage)
        self.trained, self.frozen = trained_parts(model, parallel, workload, stage), workload.adapter is not None
        self.last, self.many = stage == parallel.pipeline - 1, workload.micro_batches > 1
        self.kept = activation_bytes(model, parallel, workload, stage)
        self.layer = layer_activations(model, parallel, workload)
        head = vocabulary_rows(model, parallel.tensor) * model.hidden_size * workload.gradient_bytes
        self.head_gradient = 0 if self.frozen else head

    @property
    def groups(self):
        """Bytes of the gradients of embedding, a block, final norm and head."""
        return [elements(shapes) * self.workload.gradient_bytes for shapes, _ in self.trained.groups]

    @property
    def reduced(self):
        """Gradients after the reduction over data-parallel ranks; on CPU a scatter is a view of the whole sum."""
        return self.gradients if self.parallel.data > 1 else 0

    @property
    def gradients(self):
        """Of all layers."""
        return sum(size * count for size, (_, count) in zip(self.groups, self.trained.groups))

    def held(self):
        """What compiled graphs hold of their last call.

        The update's graph the gradients of one tensor group of each kind, the sums of micro-batches two such sets,
        those of the head's chunks two of its gradients, a block's backward pass what a layer keeps.
        """
        model, parallel, workload, held = self.model, self.parallel, self.workload, 0
        if not workload.own_operators:
            held += sum(self.groups)
            twice = self.last and self.stage == 0 and model.tie_word_embeddings and not self.frozen  # its gradient is a sum
            held += 2 * sum(self.groups) if self.many else 2 * self.groups[0] if twice else 0
            held += 2 * self.head_gradient if self.last and workload.chunks(parallel) > 1 else 0
        hidden = workload.kept_tokens(parallel) * model.hidden_size * workload.activation_bytes
        return held + self.layer + 4 * hidden + 2 * dropout_bytes(model, parallel, workload)

    def head_work(self):
        """The head at work, in its stage."""
        return _head_bytes(self.model, self.parallel, self.workload) if self.last else 0

    def backward_work(self):
        """Of a layer's backward pass, its gradients included."""
        model, parallel, workload = self.model, self.parallel, self.workload
        block = self.groups[1]
        work = _block_work(model, parallel, workload, elements(self.parts.block)) + dequantised_bytes(self.parts, workload)
        if parallel.recompute:  # all but gate and up, which the backward graph makes for itself
            inner = block_shape(model, parallel.tensor).ffn_hidden_size
            work += self.layer - 2 * workload.tokens(parallel) * inner * workload.activation_bytes
        return work + (2 * block if self.many else block)

    def update_work(self):
        """Of the update of the largest tensor."""
        if self.workload.own_operators:
            return 0
        largest = max(math.prod(shape) for shapes, _ in self.trained.groups for shape in shapes)
        return largest * FLOAT32 * (_UPDATE_COPIES + (self.workload.weight_bytes < FLOAT32 and not self.frozen))

    def phases(self):
        """Phase → [(activations, gradients, work)] at its fullest moments.

        The backward pass has two: its first layer finds all activations, its last one all gradients.
        """
        summed, backward = self.gradients if self.many else 0, self.backward_work()
        return {
            "head": [(self.kept, summed, self.head_work())],
            "backward": [(self.kept, summed or self.head_gradient * self.last, backward),
                         (0, self.gradients, backward - (0 if self.many else self.groups[1]))],
            "reduce gradients": [(0, self.gradients, self.reduced)],
            "update": [(0, self.gradients, self.update_work())],
        }

    def tables(self):
        """Masks, positions, and the tables of MindSpore's kernels."""
        return (index_tables(self.model, self.parallel, self.workload, self.stage)
                + _constants(self.model, self.parallel, self.workload))

    def others(self, passing):
        """What is there besides, name → bytes."""
        return {"framework": FRAMEWORK}


def dropout_bytes(model, parallel, workload):
    """Float32 dropout masks of one layer: of the scores, of the two outputs, and of what an adapter is given."""
    scores = score_elements(model, parallel, workload) if model.attention_dropout else 0
    hidden = 2 * workload.kept_tokens(parallel) * model.hidden_size if model.hidden_dropout else 0
    return FLOAT32 * (scores + hidden + workload.tokens(parallel) * workload.adapter_dropout)


def index_tables(model, parallel, workload, stage):
    """Tables that MindSpore's CPU kernels keep for as long as a graph exists.

    An elementwise kernel that broadcasts keeps the positions of both operands, 8 bytes each, for every
    element of its result. The kernels tile small operands instead; only the graph of a head that is cut over
    ranks has 2 such kernels at the logits. A sum of bfloat16 keeps them even without broadcasting; with operators of
    our own there is none.
    """
    vocabulary = vocabulary_rows(model, parallel.tensor) if stage == parallel.pipeline - 1 else 0
    total = 2 * workload.logit_rows(workload.tokens(parallel)) * vocabulary * (parallel.tensor > 1)
    if workload.gradient_bytes < FLOAT32:
        many = workload.micro_batches > 1
        total += vocabulary * model.hidden_size * ((workload.chunks(parallel) > 1) + many)
        total += elements(stage_parts(model, parallel, stage).block) * many
    return 16 * total


def _head_bytes(model, parallel, workload):
    """The head at work: float32 logits of a chunk, gradients of head and input of up to four of its calls.

    By own operators there is one call, and at once its inputs, these behind the norm, and the gradients of both.
    """
    tokens, rows = workload.tokens(parallel), vocabulary_rows(model, parallel.tensor)
    chunk = workload.logit_rows(tokens)
    calls = 1 if workload.chunks(parallel) == 1 else 4
    inputs = 4 if workload.own_operators and parallel.tensor == 1 else calls
    gradient = 0 if workload.adapter else calls * rows * model.hidden_size * workload.gradient_bytes
    if workload.casts:
        gradient += _casts(workload) * rows * model.hidden_size * workload.activation_bytes
    return (gradient + _LOGIT_COPIES * chunk * rows * FLOAT32
            + (inputs + parallel.sequence_parallel) * tokens * model.hidden_size * workload.activation_bytes)


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
