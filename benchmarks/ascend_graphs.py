"""Kernels a layer and compile times of the Ascend graphs, without a card: python benchmarks/ascend_graphs.py

Everything is compiled by MindSpore's front end alone, at small widths, in bfloat16.
"""

import pathlib
import sys
import time
import typing

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from mindspore import Tensor  # noqa: E402

from telechat.generation.block_table import BlockTable  # noqa: E402
from telechat.generation.graph_steps import LAYERS_A_GRAPH  # noqa: E402
from telechat.generation.graphs import DecodeBlocks, PrefillAttention  # noqa: E402
from tests.ascend.conftest import Parts, bfloat16, int32  # noqa: E402
from tests.ascend.mindir import export  # noqa: E402

DEPTHS = (2, 8, 38, 64)


class Pass(typing.NamedTuple):
    """Kernels, and bytes of the graphs, of a block's pass."""

    kernels: int
    size: int


def timed(cell, *inputs):
    """A graph and the seconds that it took."""
    begin = time.perf_counter()
    graph = export(cell, *inputs)
    return graph, time.perf_counter() - begin


def together(*halves):
    """Kernels and bytes of graphs that run one after the other, and the seconds that all took."""
    graphs, seconds = zip(*halves)
    return Pass(sum(graph.kernels() for graph in graphs), sum(graph.size for graph in graphs)), sum(seconds)


def decode(parts, table, layers):
    """`DecodeBlocks` of so many layers."""
    tensors = []
    for _ in range(layers):
        caches = [bfloat16(*parts.kernels.cache_shape(table.pool.count, table.block_size, 2, 16)) for _ in range(2)]
        tensors += [*caches, *caches, *parts.weights]
    return timed(DecodeBlocks(parts.model, 256), bfloat16(2, 64), bfloat16(2, 64), int32(2), int32(2),
                 Tensor(table.table), int32(2), None, *tensors)


def main():
    parts, table = Parts(), BlockTable(2, 256, 128)
    caches = [bfloat16(*parts.kernels.cache_shape(table.pool.count, table.block_size, 2, 16)) for _ in range(2)]
    passes = list(zip(parts.attention(), parts.feed_forward()))
    export(*passes[0][0])
    (forward, forward_time), (backward, backward_time) = (together(*(timed(*half) for half in halves))
                                                          for halves in passes)
    prefill, _ = timed(PrefillAttention(parts.functions), bfloat16(parts.rows, 64), *parts.tables, int32(parts.rows),
                       *caches, *parts.weights[:5])
    prefill, _ = together((prefill, 0), timed(*parts.feed_forward()[0]))
    decoding, times = {}, {}
    for layers in sorted({1, *(min(depth, LAYERS_A_GRAPH) for depth in DEPTHS),
                          *(depth % LAYERS_A_GRAPH for depth in DEPTHS)} - {0}):
        decoding[layers], times[layers] = decode(parts, table, layers)
    print("kernels a layer   training forward, backward, prefill, decoding")
    print(f"                  {forward.kernels}, {backward.kernels}, {prefill.kernels}, "
          f"{decoding[2].kernels() - decoding[1].kernels()}")
    print("layers            training graphs of a block; decoding graphs: seconds, bytes")
    for depth in DEPTHS:
        sizes = {min(depth, LAYERS_A_GRAPH), *([depth % LAYERS_A_GRAPH] if depth > LAYERS_A_GRAPH else [])} - {0}
        print(f"{depth:6d}            {forward_time + backward_time:.1f} s, {forward.size + backward.size:,}; "
              f"{sum(times[size] for size in sizes):.1f} s, {sum(decoding[size].size for size in sizes):,}")


if __name__ == "__main__":
    main()
