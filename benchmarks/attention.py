"""Attention over a long sequence, forward and backward: memory and time beside scaled_dot_product_attention.

Once alone, once within a layer. The queries of attention alone are taken as already multiplied by the scale.
"""

import statistics
import time
import zlib

from benchmarks import measure
from benchmarks.report import Row, Section
from benchmarks.workspace import SIZES

LENGTH = 8192
SIZE = dict(SIZES["S"], n_layer=1, vocab_size=64)  # one layer, and next to nothing around it
HEADS, DIM = SIZE["n_head"], SIZE["hidden_size"] // SIZE["n_head"]
MEMORY_GOAL, TIME_GOAL = 1.2, 1.0  # to torch's
NOTHING = 32  # tokens of a run whose memory counts as an empty process's
PASSES = 4  # of a run that is timed; the first one is not


def draw(seed, *shape):
    """Random float32 numbers, the same on both sides."""
    import numpy as np

    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def weight(name, shape):
    """The layer's weights, the same on both sides."""
    import numpy as np

    name = name.removeprefix("transformer.h.0.")
    if len(shape) == 1:
        return np.full(shape, "norm" in name, np.float32)
    return draw(zlib.crc32(name.encode()), *shape) * np.float32(0.02)


def ours_alone(length, passes):
    """In a child: the library's attention as a layer in training calls it, in graphs, from and to heads as it has them."""
    import mindspore as ms

    from telechat.config import TeleChatConfig
    from telechat.nn.kernel_choice import choose_kernels

    config = TeleChatConfig(**SIZE)
    kernels = choose_kernels(config, ms.float32)
    visible = kernels.attention_tensors(config, length)
    forward, backward = ms.jit(kernels.attention_in_training), ms.jit(kernels.attention_backward)
    query, key, value, dresult = (ms.Tensor(draw(seed, 1, HEADS, length, DIM).transpose(0, 2, 1, 3).reshape(length, -1))
                                  for seed in range(4))
    query, key, value = (kernels.split_heads(x, length, DIM) for x in (query, key, value))

    def run():
        attended, kept = forward(query, key, value, *visible, 1.0)
        outcome = attended, *backward(dresult, attended, query, key, value, kept, *visible, 1.0)
        ms.runtime.synchronize()
        return outcome

    return _figures(run, passes, lambda part: part.asnumpy())


def best_alone(length, passes):
    """In a child: torch's scaled_dot_product_attention."""
    import torch

    shape = (1, HEADS, length, DIM)
    query, key, value, dresult = (torch.from_numpy(draw(seed, *shape)).requires_grad_(seed < 3) for seed in range(4))

    def run():
        query.grad = key.grad = value.grad = None
        result = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, scale=1.0)
        result.backward(dresult)
        return result.detach(), query.grad, key.grad, value.grad

    return _figures(run, passes, lambda part: part.numpy())


def ours_layer(length, passes):
    """In a child: the passes of a layer in training."""
    import mindspore as ms

    import telechat
    from telechat.config import TeleChatConfig
    from telechat.nn.block_training import BlockTraining
    from telechat.nn.positions import sequence_tables

    config = TeleChatConfig(**SIZE)
    model = telechat.TeleChat(config, tensors=weight)
    block = model.transformer.h[0]
    training = BlockTraining(block.functions)
    weights = [None if parameter is None else parameter.data for parameter in block.weights()]
    kernels = model.kernels
    tables = (*map(kernels.rotary_tensor, sequence_tables(config, length)), *kernels.attention_tensors(config, length))
    drops = (None,) * 3
    x, dy = (ms.Tensor(draw(seed, length, SIZE["hidden_size"])) for seed in range(2))

    def run():
        y, kept = training.forward(x, tables, drops, weights)
        outcome = y, *training.backward(dy, x, kept, tables, drops, weights)
        ms.runtime.synchronize()
        return outcome

    return _figures(run, passes, lambda part: part.asnumpy())


def best_layer(length, passes):
    """In a child: the same layer in torch."""
    import torch

    from benchmarks import peer_blocks
    from telechat.config import TeleChatConfig

    config = TeleChatConfig(**SIZE)
    block = peer_blocks.Block(config, peer_blocks.BestAttention)
    block.load_state_dict({name: torch.from_numpy(weight(name, tuple(tensor.shape)))
                           for name, tensor in block.state_dict().items()})
    cos, sin = (table[:length] for table in peer_blocks.rotary_tables(config, length))
    x, dy = (torch.from_numpy(draw(seed, 1, length, SIZE["hidden_size"])) for seed in range(2))
    x.requires_grad_(True)
    attention, mlp = block.self_attention, block.mlp
    # In the order of `telechat.nn.block.Block.weights`.
    inputs = [x, block.input_layernorm.weight, attention.query.weight, attention.key_value.weight,
              attention.dense.weight, attention.dense.bias, block.post_attention_layernorm.weight,
              mlp.gate_proj.weight, mlp.up_proj.weight, mlp.down_proj.weight, mlp.down_proj.bias]

    def run():
        for tensor in inputs:
            tensor.grad = None
        middle = x + attention(block.input_layernorm(x), cos, sin)
        y = middle + mlp(block.post_attention_layernorm(middle))
        y.backward(dy)
        return y.detach(), *(tensor.grad for tensor in inputs)

    return _figures(run, passes, lambda part: part.numpy())


def _figures(run, passes, as_array):
    import numpy as np

    taken = []
    for _ in range(passes):
        outcome = None  # freed before the next is made
        started = time.perf_counter()
        outcome = run()
        taken.append(time.perf_counter() - started)
    return {"seconds": statistics.median(taken[1:] or taken), "squares": [float(np.vdot(part, part)) for part in map(as_array, outcome)]}


def run(workspace):
    """Attention alone and within a layer; `Section`."""
    length = LENGTH // 4 if workspace.quick else LENGTH
    memory, times = [], []
    for name, words in (("alone", "attention alone"), ("layer", "a layer")):
        sides = {"ours": f"ours_{name}", "best": f"best_{name}"}
        once = measure.side_by_side("attention", sides.values(), dict(length=length, passes=1), workspace.rounds)
        empty = measure.side_by_side("attention", sides.values(), dict(length=NOTHING, passes=1), workspace.rounds)
        timed = measure.side_by_side("attention", sides.values(), dict(length=length, passes=PASSES), workspace.rounds)
        ours, best = (once[function][0]["squares"] for function in sides.values())
        measure.check_close(f"{words}, squares of the results and gradients", ours, best, 1e-3)
        what = f"{words}, 1 × {length:,}, forward and backward"
        memory.append(Row(f"memory of {what}", "MB", goal_best=MEMORY_GOAL, **{
            side: (measure.median(once[function], "peak_memory") - measure.median(empty[function], "peak_memory")) / 1e6
            for side, function in sides.items()}))
        times.append(Row(what, "s", goal_best=TIME_GOAL, **{side: measure.median(timed[function], "seconds")
                                       for side, function in sides.items()}))
    return Section(memory + times, notes=[
        f"Width, heads and feed-forward width of S. Memory is the peak of a process that makes one pass, less that "
        f"of one that makes it over {NOTHING} tokens; times are of further passes."])
