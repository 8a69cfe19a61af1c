"""What a step computes and sends, how long it should take on stated hardware, and which mesh is best.

FLOPs and pipeline as in Narayanan et al., "Efficient Large-Scale Language Model Training on GPU Clusters
Using Megatron-LM" (arXiv:2104.04473), with this model's gated feed-forward layer in place of GPT's.
Collectives are those of this implementation, with Ascend's native primitives.
"""

import dataclasses

from telechat.errors import InputError
from telechat.parallel.estimate import FLOAT32, elements, is_cut, stage_parts, trained_parts
from telechat.parallel.estimate_peak import stage_memory
from telechat.parallel.parallel_config import ParallelConfig
from telechat.parallel.plan import check_mesh, cut_axis, stage_layers

# Bytes that a rank sends for each byte of the whole tensor, in a group of k: a ring's, arXiv:1910.02054,
# section 7.1.
_SENT = {"all-reduce": lambda k: 2 * (k - 1) / k, "all-gather": lambda k: (k - 1) / k,
         "reduce-scatter": lambda k: (k - 1) / k, "send": lambda k: 1}


@dataclasses.dataclass(frozen=True)
class Traffic:
    """One kind of communication of one rank, summed over a step."""

    purpose: str
    operation: str  # "all-reduce", "all-gather", "reduce-scatter" or "send"
    group: str  # "tensor", "data", "pipeline", "embedding" or "world"
    size: int  # ranks in it
    calls: int
    tensor_bytes: int  # of the whole tensors: result of a gather, argument of a scatter
    each_micro_batch: bool  # or once a step

    @property
    def sent_bytes(self):
        """What the rank sends, all calls together."""
        return _SENT[self.operation](self.size) * self.tensor_bytes


def cards_of(parallel):
    """How many cards a `ParallelConfig` with ``data`` filled in takes."""
    return parallel.tensor * parallel.pipeline * parallel.data


def traffic(model, parallel, workload, stage):
    """All communication of a rank in pipeline stage ``stage`` in one step, as a list of `Traffic`.

    It assumes that every token counts in the loss; where fewer do, the head works on fewer chunks.
    """
    result = []

    def add(purpose, operation, group, calls, total, each_micro_batch=True):
        if sizes[group] > 1 and calls:
            result.append(Traffic(purpose, operation, group, sizes[group], calls, total, each_micro_batch))

    sizes = {"tensor": parallel.tensor, "pipeline": parallel.pipeline, "data": parallel.data,
             "embedding": min(parallel.pipeline, 2), "world": cards_of(parallel)}
    parts, sequence = stage_parts(model, parallel, stage), parallel.sequence_parallel
    frozen = workload.adapter is not None
    first, last, micro = stage == 0, stage == parallel.pipeline - 1, workload.micro_batches
    tokens, hidden = workload.tokens(parallel), model.hidden_size
    width, wide = workload.weight_bytes, workload.activation_bytes
    rows = tokens * hidden * wide
    # Around each pair of products (arXiv:1909.08053, section 3; with sequence parallelism arXiv:2205.05198,
    # section 4.2.2, whose inputs are gathered once more in the backward pass). Recomputation makes attention's
    # pair once more; of the feed-forward layer's only the inputs, which the backward pass gathers anyway.
    pairs = 2 * parts.layers * micro
    forwards = pairs + parts.layers * micro * parallel.recompute
    if sequence:
        for operation, backwards in (("all-gather", 2 * pairs), ("reduce-scatter", pairs)):
            add("blocks, forward", operation, "tensor", forwards, forwards * rows)
            add("blocks, backward", operation, "tensor", backwards, backwards * rows)
        vectors = [] if frozen else [shape for shape in parts.block if len(shape) == 1] * parts.layers
        add("gradients of norms and biases", "all-reduce", "tensor", len(vectors),
            elements(vectors) * width, False)
    else:
        add("blocks, forward", "all-reduce", "tensor", forwards, forwards * rows)
        add("blocks, backward", "all-reduce", "tensor", pairs, pairs * rows)
    if frozen:
        whole = [shape for name, shape in workload.adapter.items() if cut_axis(name) is None] * parts.layers
        add("adapter's whole gradients", "all-reduce", "tensor", len(whole), elements(whole) * FLOAT32, False)
    if first:
        add("embedding", "reduce-scatter" if sequence else "all-reduce", "tensor", micro, micro * rows)
        add("embedding, backward", "all-gather", "tensor", micro * sequence * (not frozen), micro * rows)
    if last:
        chunk, chunks = workload.logit_rows(tokens), workload.chunks(parallel) * micro
        add("head's input", "all-gather", "tensor", micro * sequence, micro * rows)
        add("cross entropy", "all-reduce", "tensor", 3 * chunks, 3 * chunks * chunk * FLOAT32)
        add("head, backward", "all-reduce", "tensor", chunks, chunks * chunk * hidden * wide)
    messages = micro * workload.kept_tokens(parallel) * hidden * wide
    add("activations to the next stage", "send", "pipeline", 0 if last else micro, messages)
    add("gradients to the previous stage", "send", "pipeline", 0 if first else micro, messages)
    if model.tie_word_embeddings and (first or last) and not frozen:
        add("gradient of the tied embedding", "all-reduce", "embedding", 1,
            elements(parts.embedding) * width, False)
    for cut, operation in ((True, "reduce-scatter"), (False, "all-reduce")):
        shapes = [shape for group, count in trained_parts(model, parallel, workload, stage).groups
                  for shape in group * count if is_cut(shape, parallel) == cut]
        size = elements(shapes) * (FLOAT32 if frozen else width)
        add("gradients", operation, "data", len(shapes), size, False)
        add("updated weights", "all-gather", "data", len(shapes) * cut, size, False)
    # Each in two parts on a CPU, which keeps float64's digits.
    add("loss, gradient norm and stop flag", "all-reduce", "world", 1, 3 * 2 * FLOAT32, False)
    return result


def step_flops(model, workload):
    """FLOPs that the model itself takes for a step, over all ranks.

    6 · (weights in products) · tokens, 2 forward and 4 backward, and 12 · layers · S · (heads · head size) ·
    tokens for the attention's two products, in full although half of the scores are masked
    (arXiv:2104.04473, appendix). A frozen weight takes 4, for it has no gradient, and an adapter's 6 besides.
    """
    tokens = workload.batch_size * workload.sequence_length
    block, head = _product_weights(model)
    attention = 12 * workload.sequence_length * model.n_head * model.head_dim
    each, adapter = _flops_of_weights(workload)
    return tokens * (model.n_layer * (each * block + adapter + attention) + each * head)


def _flops_of_weights(workload):
    """FLOPs a token of a weight in a product, forward and backward; and of a layer's adapter."""
    if workload.adapter is None:
        return 6, 0
    return 4, 6 * elements(workload.adapter.values())


def stage_flops(model, parallel, workload, stage):
    """FLOPs of a rank for one micro-batch, with what this implementation computes again.

    A backward pass makes the scores anew, one product of the attention's two; recomputation the blocks'
    forward pass but for its last product.
    """
    tokens = workload.tokens(parallel)
    block, head = _product_weights(model)
    product = 2 * workload.sequence_length * model.n_head * model.head_dim  # one of attention's two, a token
    down = model.hidden_size * model.ffn_hidden_size
    each, adapter = _flops_of_weights(workload)
    layer = each * block + adapter + 7 * product + (2 * (block - down) + 2 * product if parallel.recompute else 0)
    total = len(stage_layers(model, parallel)[stage]) * layer
    if stage == parallel.pipeline - 1:
        total += each * head
    return tokens * total / parallel.tensor


def _product_weights(model):
    """How many weights of a block, and of the head, are factors of a product."""
    heads, key_values = model.n_head * model.head_dim, 2 * model.num_key_value_heads * model.head_dim
    block = model.hidden_size * (2 * heads + key_values + 3 * model.ffn_hidden_size)
    return block, model.vocab_size * model.hidden_size


@dataclasses.dataclass(frozen=True)
class Hardware:
    """Cards and links as the user states them. Nothing here is measured."""

    card_memory: int  # bytes
    card_flops: float  # a second, of products in the working dtype
    efficiency: float  # the share of it that products reach
    link: float  # bytes a second that a card sends to others of its node
    node_link: float  # to cards of other nodes
    latency: float = 0.0  # seconds that a call takes however short its message
    cards_per_node: int = 8

    def link_between(self, span):
        """Link of a group of ranks of which the first and last are ``span`` − 1 apart."""
        return self.link if span <= self.cards_per_node else self.node_link


@dataclasses.dataclass(frozen=True)
class Prediction:
    """A predicted step."""

    seconds: float
    tokens_per_second: float  # of one card
    waiting: float  # the share of the step that a rank of the slowest stage waits for other stages
    communicating: float  # the share that it communicates, tensors and reductions
    utilization: float  # the model's FLOPs against all that the cards could do in that time


def predict(model, parallel, workload, hardware):
    """`Prediction` of a step, from assumed speeds.

    Every micro-batch goes once through all stages, the slowest of which then sets the pace:
    Σ t_s + (m − 1) · max t_s, which for equal stages is (m + p − 1) · t (arXiv:2104.04473, section 2.2).
    t_s is products at the assumed efficiency, then communication, not overlapped. Elementwise work and the
    update are not counted: the assumed efficiency has to cover them.
    """
    span = {"tensor": parallel.tensor, "data": parallel.tensor * parallel.data}
    cards = cards_of(parallel)
    times, exchanges, once = [], [], []
    for stage in range(parallel.pipeline):
        inside, after = 0.0, 0.0
        for item in traffic(model, parallel, workload, stage):
            seconds = (item.sent_bytes / hardware.link_between(span.get(item.group, cards))
                       + item.calls * hardware.latency)
            if item.each_micro_batch:
                inside += seconds / workload.micro_batches
            else:
                after += seconds
        products = stage_flops(model, parallel, workload, stage) / (hardware.card_flops * hardware.efficiency)
        times.append(products + inside)
        exchanges.append(inside)
        once.append(after)
    slowest = times.index(max(times))
    busy = workload.micro_batches * times[slowest]
    passes = sum(times) + (workload.micro_batches - 1) * times[slowest]
    seconds = passes + max(once)
    tokens = workload.batch_size * workload.sequence_length
    return Prediction(seconds, tokens / seconds / cards, (passes - busy) / seconds,
                      (workload.micro_batches * exchanges[slowest] + max(once)) / seconds,
                      step_flops(model, workload) / (seconds * cards * hardware.card_flops))


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A mesh with its settings, the memory of its fullest rank and its predicted speed."""

    parallel: ParallelConfig
    micro_batches: int
    peak: int
    prediction: Prediction


def search(model, cards, workload, hardware):
    """All meshes of ``cards`` cards, each with its fastest settings that fit, else those of least memory.

    Varied: tensor, pipeline, data, micro_batches, sequence_parallel, shard_optimizer and recompute. The
    batch stays. Equally fast settings: the one with less memory.

    Returns:
        (list, list): `Candidate` of the meshes that fit into ``hardware.card_memory``, fastest first, and of
        those that do not, smallest first.
    """
    fitting, others = [], []
    for tensor in _divisors(cards):
        for pipeline in _divisors(cards // tensor):
            base = ParallelConfig(tensor=tensor, pipeline=pipeline, data=cards // tensor // pipeline)
            found = list(_settings(model, base, workload, hardware)) if _fits_model(model, base) else []
            fit = [candidate for candidate in found if candidate.peak <= hardware.card_memory]
            if fit:
                fitting.append(min(fit, key=lambda candidate: (candidate.prediction.seconds, candidate.peak)))
            elif found:
                others.append(min(found, key=lambda candidate: candidate.peak))
    return (sorted(fitting, key=lambda candidate: (candidate.prediction.seconds, candidate.peak)),
            sorted(others, key=lambda candidate: candidate.peak))


def _settings(model, base, workload, hardware):
    """`Candidate` for every setting of one mesh that the batch allows."""
    if workload.batch_size % base.data:
        return
    for micro_batches in _divisors(workload.batch_size // base.data):
        step = dataclasses.replace(workload, micro_batches=micro_batches)
        for sequence in (False, True) if base.tensor > 1 else (False,):
            if sequence and step.tokens(base) % base.tensor:
                continue
            for shard in (False, True) if base.data > 1 else (False,):
                for recompute in (False, True):
                    parallel = dataclasses.replace(base, sequence_parallel=sequence, shard_optimizer=shard,
                                                   recompute=recompute)
                    peak = max(stage_memory(model, parallel, step, stage).peak
                               for stage in range(base.pipeline))
                    yield Candidate(parallel, micro_batches, peak, predict(model, parallel, step, hardware))


def _fits_model(model, parallel):
    try:
        check_mesh(model, parallel)
    except InputError:
        return False
    return True


def _divisors(number):
    return [candidate for candidate in range(1, number + 1) if number % candidate == 0]
