"""The graphs of generation on Ascend, and of the whole model."""

from mindspore import Tensor

from telechat.generation.block_table import BlockTable
from telechat.generation.graphs import DecodeBlocks, PrefillAttention
from tests.ascend.conftest import bfloat16, int32
from tests.ascend.mindir import export
from tests.ascend.test_training_graphs import check_clean

DECODE_BUDGET = 14  # kernels of a layer


def caches(parts, table, count):
    shape = parts.kernels.cache_shape(table.pool.count, table.block_size, 2, 16)
    assert shape == (table.pool.count, 128, 2, 16)
    return [bfloat16(*shape) for _ in range(count)]


def test_prefill(parts):
    table = BlockTable(2, 256, 128)
    graph = export(PrefillAttention(parts.functions), bfloat16(parts.rows, 64), *parts.tables, int32(parts.rows),
                   *caches(parts, table, 2), *parts.weights[:5])
    counts = graph.counts()
    assert (counts["FlashAttentionScore"], counts["ReshapeAndCache"], counts["RmsNorm"]) == (1, 1, 1)
    assert "TensorMove" not in counts
    write = graph.named("ReshapeAndCache")[0]
    assert [graph.types[name] for name in write.inputs[2:4]] == [("bfloat16", (4, 128, 2, 16))] * 2
    check_clean(graph)


def check_decode(graph, layers):
    counts = graph.counts()
    names = ("PagedAttention", "ReshapeAndCache", "ApplyRotaryPosEmb", "Swiglu")
    assert [counts[name] for name in names] == [layers] * 4
    assert "TensorMove" not in counts, "a cache would be copied"
    for operation in graph.named("PagedAttention"):
        assert operation.constants[10:13] == [4, 0.25, 2], "heads, scale, key-value heads"
        assert graph.types[operation.inputs[3]] == ("int32", (2, 2))
    check_clean(graph)


def test_decode(parts):
    """Two and three blocks in one graph; what a layer costs is the difference."""
    table = BlockTable(2, 256, 128)
    kernels = []
    for layers in (2, 3):
        tensors = []
        for _ in range(layers):
            held = caches(parts, table, 2)
            tensors += [*held, *held, *parts.weights]
        graph = export(DecodeBlocks(parts.model, 256), bfloat16(2, 64), bfloat16(2, 64), int32(2), int32(2),
                       Tensor(table.table), int32(2), None, *tensors)
        check_decode(graph, layers)
        kernels.append(graph.kernels())
    print(f"decode: {kernels[1] - kernels[0]} kernels a layer", graph.counts())
    assert kernels[1] - kernels[0] <= DECODE_BUDGET


def test_whole_model(parts):
    graph = export(parts.model, int32(1, 16), *parts.model.tables(16))
    counts = graph.counts()
    names = ("FlashAttentionScore", "RmsNorm", "RotaryPositionEmbedding", "Swiglu")
    assert [counts[name] for name in names] == [2, 5, 4, 2]
    assert graph.operations[-1].outputs[0] == ("float32", (16, 96)), "the logits"
    check_clean(graph)
