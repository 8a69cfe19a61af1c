"""The peak of a training step's memory on an Ascend card, from shapes alone.

What MindSpore's Ascend back end allocates was read off, pass by pass, on the simulated card (simulator/README.md), whose
operators take no room to work in: tests/ascend/test_memory.py holds the whole to its peaks. Sizes are in bytes.
"""

import math
import os

from telechat.parallel.estimate import (FLOAT32, activation_bytes, dequantised_bytes, elements, is_cut, layer_activations, score_elements,
                                        stage_parts, trained_parts)
from telechat.parallel.mesh import Mesh
from telechat.parallel.plan import block_shape, vocabulary_rows

CAUSAL_MASK = 2048 * 2048  # flash attention's, a byte each
# What MindSpore's pool holds beyond the tensors in it, as a share of those that come and go: 0.1 to 0.25, and more where
# they are few, from run to run.
FRAGMENTATION = 0.15
_HCCL_BUFFER = 200  # MB, HCCL's own default of HCCL_BUFFSIZE; a group has one to send from and one to receive in
# Tensors at work beyond arguments and results, as multiples of attention scores (portable attention alone makes them)
# and of one activation of the feed-forward width.
_FORWARD_SCORES, _BACKWARD_SCORES, _FORWARD_INNER, _BACKWARD_INNER = 3, 4, 5, 4
_LOGITS = 2  # float32 logits of a chunk: log probabilities and their gradient
_HELD_HIDDEN = 8  # of a layer's passes and the head's: arguments that graphs hold, of the residual's width


def communicators(parallel, stage):
    """How many HCCL groups a rank of a stage is in: those of `Mesh.create`, and MindSpore's own of all processes."""
    size = parallel.tensor * parallel.pipeline * parallel.data
    if size == 1:
        return 0
    place = Mesh.place(stage * parallel.tensor * parallel.data, parallel.pipeline, parallel.data, parallel.tensor)
    kinds = (place.tensor, place.data, place.pipeline, place.world, place.embedding)
    return 1 + len({group.name for group in kinds if group.size > 1}) + (parallel.pipeline > 1)


def communicator_bytes(count):
    """Buffers of ``count`` HCCL groups, as HCCL_BUFFSIZE (MB) of this process's environment has them."""
    given = os.environ.get("HCCL_BUFFSIZE", "")
    return count * 2 * (int(given) if given.isdigit() else _HCCL_BUFFER) * 2 ** 20


class CardStep:
    """The moments of a training step at which a card may be fullest.

    Args:
        model (TeleChatConfig), parallel (ParallelConfig), workload (Workload), stage (int): as of `stage_memory`.
    """

    def __init__(self, model, parallel, workload, stage):
        self.model, self.parallel, self.workload = model, parallel, workload
        self.parts, self.trained = stage_parts(model, parallel, stage), trained_parts(model, parallel, workload, stage)
        self.frozen = workload.adapter is not None
        self.stage, self.last = stage, stage == parallel.pipeline - 1
        self.kept = activation_bytes(model, parallel, workload, stage)
        self.many = workload.micro_batches > 1
        self.tied = (self.last or stage == 0) and model.tie_word_embeddings
        wide, share = workload.activation_bytes, block_shape(model, parallel.tensor)
        self.hidden = workload.kept_tokens(parallel) * model.hidden_size * wide
        self.whole_hidden = workload.tokens(parallel) * model.hidden_size * wide
        self.inner = workload.tokens(parallel) * share.ffn_hidden_size * wide
        self.layer = layer_activations(model, parallel, workload)
        self.dequantised = dequantised_bytes(self.parts, workload)
        self.scores = 0 if workload.flash else FLOAT32 * score_elements(model, parallel, workload)

    @property
    def group_widths(self):
        """Bytes of a number of the gradients of embedding, a block, and final norm and head: the last float32 always."""
        width = FLOAT32 if self.many else self.workload.gradient_bytes
        return FLOAT32 if self.tied else width, width, FLOAT32

    @property
    def gradients(self):
        """Of all layers; sums of micro-batches are there all the time."""
        return sum(width * elements(shapes) * count for width, (shapes, count) in zip(self.group_widths, self.trained.groups))

    @property
    def one_of_each(self):
        """Numbers of one tensor group of each kind, as the reduction over data-parallel ranks leaves them."""
        return [sum(math.prod(shape) // (self.parallel.data if is_cut(shape, self.parallel) else 1) for shape in shapes)
                for shapes, _ in self.trained.groups]

    @property
    def reduced(self):
        """Gradients after that reduction; 0 where there is none."""
        if self.parallel.data == 1:
            return 0
        return sum(width * one * count for width, one, (_, count) in
                   zip(self.group_widths, self.one_of_each, self.trained.groups))

    def dropout(self):
        """Masks of a layer: bits of flash attention's, else float32, and the two of what is added to the residual."""
        model, tokens = self.model, self.workload.tokens(self.parallel)
        attention = self.scores
        if self.workload.flash:
            attention = tokens * (model.n_head // self.parallel.tensor) * self.workload.sequence_length // 8
        adapter = tokens * self.workload.adapter_dropout * self.workload.activation_bytes
        return attention * (model.attention_dropout > 0) + 2 * self.hidden * (model.hidden_dropout > 0) + adapter

    def held(self):
        """What compiled graphs keep of their last call.

        The passes of a block keep its activations, the gradients around it and dropout's masks.
        """
        layer = self.layer - (2 * self.inner if self.parallel.recompute else 0)
        return layer + _HELD_HIDDEN * self.hidden + 2 * self.dropout()

    def head_work(self):
        """Of the head and its loss, in its stage: either its logits are most, or the gradients of its weight."""
        if not self.last:
            return 0
        chunk = self.workload.logit_rows(self.workload.tokens(self.parallel))
        logits = chunk * vocabulary_rows(self.model, self.parallel.tensor)
        gradient = 0 if self.frozen else self._head_numbers()
        made = logits * self.workload.activation_bytes + gradient * (self.workload.weight_bytes + FLOAT32)
        if self.workload.chunks(self.parallel) > 1:  # and the sum so far
            made += FLOAT32 * gradient
        return max(_LOGITS * FLOAT32 * logits, made) + 2 * self.whole_hidden

    def _head_numbers(self):
        return vocabulary_rows(self.model, self.parallel.tensor) * self.model.hidden_size

    def backward_work(self):
        """Of a layer's backward pass, which with recomputation begins with its forward pass."""
        again = self.layer - 2 * self.inner if self.parallel.recompute else 0
        inner = (_BACKWARD_INNER + 2 * self.parallel.recompute) * self.inner
        return max(inner, _BACKWARD_SCORES * self.scores) + again + self.dropout() + 2 * self.hidden + self.dequantised

    def forward_work(self):
        """Of a layer's forward pass."""
        return max(_FORWARD_INNER * self.inner, _FORWARD_SCORES * self.scores) + self.dropout() + 2 * self.hidden + self.dequantised

    def update_work(self):
        """AdamW works in place; a clipped gradient is made in float32."""
        return FLOAT32 * max(math.prod(shape) for shapes, _ in self.trained.groups for shape in shapes)

    def phases(self):
        """Phase → [(activations, gradients, work)] at its fullest moments."""
        summed = self.gradients if self.many else 0
        gradients, head = self.gradients, FLOAT32 * self._head_numbers() * (self.last and not self.frozen)
        block = elements(self.trained.block) * self.workload.gradient_bytes
        return {
            "forward": [(self.kept, summed, self.forward_work())],
            "head": [(self.kept, summed, self.head_work())],
            "backward": [(self.kept, summed or head, self.backward_work() + block),
                         (0, gradients, self.backward_work() + block * self.many)],
            "reduce gradients": [(0, gradients, self.reduced)],
            "update": [(0, summed + self.reduced or gradients, self.update_work())],
        }

    def tables(self):
        """The causal mask, one for all, and rotary tables."""
        length = self.workload.sequence_length
        mask = CAUSAL_MASK if self.workload.flash else FLOAT32 * length ** 2
        if self.model.position_embedding == "alibi":
            mask += length ** 2 * self.workload.activation_bytes * self.model.n_head // self.parallel.tensor
        return mask + 2 * length * self.model.head_dim * self.workload.activation_bytes

    def others(self, passing):
        """What is there besides, name → bytes; ``passing``: of the tensors that come and go."""
        count = communicators(self.parallel, self.stage)
        passing -= self.gradients if self.many else 0
        return {"pool": int(FRAGMENTATION * passing), "hccl": communicator_bytes(count)}
