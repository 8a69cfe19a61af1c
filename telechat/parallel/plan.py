"""Which part of each parameter a rank holds.

Column-parallel weights (query, key_value, gate, up) and the vocabulary (embedding, head) are cut
along their rows, row-parallel ones (dense, down) along their columns; norms and biases are whole on
every tensor-parallel rank (Shoeybi et al., "Megatron-LM", arXiv:1909.08053). Since key_value is laid
out head by head, a part is always one plain slice.
"""

import dataclasses
import math

from telechat.errors import InputError

_ROWS = ("word_embeddings.weight", "lm_head.weight", "query.weight", "key_value.weight",
         "gate_proj.weight", "up_proj.weight")
_COLUMNS = ("dense.weight", "down_proj.weight")
# Of an adapter, B of a column-parallel weight is cut and A whole; of a row-parallel one A is cut and B whole.
_ROWS += tuple(f"{name}.lora_B.weight" for name in ("query", "key_value", "key", "value", "gate_proj", "up_proj"))
_COLUMNS += ("dense.lora_A.weight", "down_proj.lora_A.weight")
_VOCABULARY = ("word_embeddings.weight", "lm_head.weight")


@dataclasses.dataclass(frozen=True)
class BlockShape:
    """What `telechat.nn.block.Block` reads of a config, for a tensor-parallel rank's share of the heads."""

    hidden_size: int
    n_head: int
    num_key_value_heads: int
    head_dim: int
    ffn_hidden_size: int
    layer_norm_epsilon: float
    use_bias: bool
    position_embedding: str


def block_shape(config, tensor):
    """The share of one of ``tensor`` ranks."""
    return BlockShape(config.hidden_size, config.n_head // tensor, config.num_key_value_heads // tensor,
                      config.head_dim, config.ffn_hidden_size // tensor, config.layer_norm_epsilon,
                      config.use_bias, config.position_embedding)


def vocabulary_rows(config, tensor):
    """Rows of the embedding that each rank holds; the last rank's may reach past the vocabulary."""
    return -(-config.vocab_size // tensor)


def cut_axis(name):
    """The axis along which the parameter ``name`` is cut over tensor-parallel ranks, or None."""
    if name.endswith(_ROWS):
        return 0
    return 1 if name.endswith(_COLUMNS) else None


def local_slices(name, shape, rank, size):
    """The part of a parameter that tensor-parallel rank ``rank`` of ``size`` holds.

    Args:
        name (str): canonical name.
        shape (tuple): of the whole parameter.
        rank, size (int): place in the tensor-parallel group.

    Returns:
        tuple of slice: one for each axis; an empty one where a rank holds nothing but padding.
    """
    slices = [slice(0, length) for length in shape]
    axis = cut_axis(name)
    if axis is not None and size > 1:
        width = -(-shape[axis] // size)
        slices[axis] = slice(min(rank * width, shape[axis]), min((rank + 1) * width, shape[axis]))
    return tuple(slices)


def is_vocabulary(name):
    """Whether the parameter has a row a token, so that the last rank's part is filled up with zeros."""
    return name.endswith(_VOCABULARY)


def check_mesh(config, parallel, processes=None):
    """Refuse a mesh that the model does not fit.

    Args:
        config (TeleChatConfig): the model.
        parallel (ParallelConfig): the mesh.
        processes (int): of the run, where what is proposed instead has to fit these too; None: any number.

    Raises:
        InputError: names the numbers and the nearest that fit.
    """
    tensor, pipeline = parallel.tensor, parallel.pipeline
    lengths = {name: getattr(config, name) for name in ("n_head", "num_key_value_heads", "ffn_hidden_size")}
    # A given ``data`` leaves no choice: what is proposed then goes with another number of processes.
    free = processes if parallel.data is None else None
    common = math.gcd(*lengths.values())
    tensors = [size for size in range(1, min(common, config.vocab_size) + 1)
               if common % size == 0 and _leaves_data(free, size * pipeline)]
    pipelines = [size for size in range(1, config.n_layer + 1) if _leaves_data(free, size * tensor)]
    for name, length in lengths.items():
        if length % tensor:
            raise InputError(f"parallel.tensor {tensor} does not divide {name} {length}; {_nearest(tensors, tensor)}")
    if tensor > config.vocab_size:
        raise InputError(f"parallel.tensor {tensor} is more than vocab_size {config.vocab_size}; "
                         f"{_nearest(tensors, tensor)}")
    if pipeline > config.n_layer:
        raise InputError(f"parallel.pipeline {pipeline} is more than n_layer {config.n_layer}; "
                         f"{_nearest(pipelines, pipeline)}")
    if parallel.stages is not None and sum(parallel.stages) != config.n_layer:
        raise InputError(f"parallel.stages {list(parallel.stages)} holds {sum(parallel.stages)} layers, "
                         f"the model has n_layer {config.n_layer}; make them agree")


def _leaves_data(processes, size):
    """Whether ``size`` ranks a copy of the model go into so many processes."""
    return processes is None or processes % size == 0


def _nearest(sizes, wanted):
    if not sizes:
        return "none fits this number of processes"
    return f"the nearest that fits is {min(sizes, key=lambda size: (abs(size - wanted), size))}"


def check_batch(batch_size, micro_batches, data, sequence_length, parallel):
    """Refuse a batch that does not divide over ``data`` ranks, their micro-batches and, where cut, their tokens.

    Raises:
        InputError: names the numbers.
    """
    whole = micro_batches * data
    if batch_size % whole:
        raise InputError(f"batch_size {batch_size} must be a multiple of {whole}: micro_batches "
                         f"{micro_batches} on each of {data} data-parallel ranks")
    tokens = batch_size // whole * sequence_length
    if parallel.sequence_parallel and tokens % parallel.tensor:
        raise InputError(f"parallel.sequence_parallel needs the {tokens} tokens of a micro-batch to divide by "
                         f"parallel.tensor {parallel.tensor}; change batch_size or turn it off")


def own_heads(config, tensor):
    """The heads that this rank of the tensor-parallel `Group` computes, a slice."""
    width = config.n_head // tensor.size
    return slice(tensor.rank * width, (tensor.rank + 1) * width)


def stage_layers(config, parallel):
    """The layers of each pipeline stage, balanced by the products they make.

    A block costs its weights, the head costs its own; the embedding is a gather and costs nothing.
    The slowest stage sets the pace, so the split with the smallest largest cost is chosen; among
    equals, the one whose later stages are lighter, since they also hold the logits.

    Returns:
        list of range: the layers of each stage, in order.
    """
    if parallel.stages is not None:
        counts = list(parallel.stages)
    else:
        hidden = config.hidden_size
        block = hidden * (config.head_dim * (2 * config.n_head + 2 * config.num_key_value_heads)
                          + 3 * config.ffn_hidden_size)
        head_blocks = config.vocab_size * hidden / block
        counts = _balanced(config.n_layer, parallel.pipeline, head_blocks)
    ends = [sum(counts[:stage + 1]) for stage in range(len(counts))]
    return [range(end - count, end) for end, count in zip(ends, counts)]


def _balanced(layers, stages, head):
    """Counts with the least maximum, the last stage carrying ``head`` blocks' worth more."""
    if stages == 1:
        return [layers]
    best = None
    for last in range(1, layers - stages + 2):
        rest = layers - last
        most = -(-rest // (stages - 1))
        cost = max(most, last + head)
        if best is None or cost < best[0]:
            best = (cost, last)
    last = best[1]
    share, extra = divmod(layers - last, stages - 1)
    return [share + (stage < extra) for stage in range(stages - 1)] + [last]
