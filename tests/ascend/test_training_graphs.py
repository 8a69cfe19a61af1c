"""The graphs of a training step on Ascend: fused operations, their arguments and gradients, and nothing to spare."""

import mindspore as ms
import pytest
from mindspore import nn

from telechat.nn.graphs import Accumulate, BlockBackward, BlockForward, Embed, HeadLoss, SquaredNorm, Update
from tests.ascend.conftest import Parts, bfloat16, float32, int32
from tests.ascend.mindir import export

FORWARD_BUDGET = 16  # kernels of a block's forward pass, without dropout
BACKWARD_BUDGET = 36
LARGEST = 2147483647


class Method(nn.Cell):
    """A compiled method that is not construct."""

    def __init__(self, cell, name):
        super().__init__()
        self.cell = cell
        self.method = getattr(cell, name)

    def construct(self, *arguments):
        return self.method(*arguments)


def check_clean(graph):
    """Products in bfloat16, no cast or transpose that undoes another."""
    for operation in graph.operations:
        if operation.name in ("MatMul", "Dense", "BatchMatMul", "MatMulExt"):
            assert operation.outputs[0][0] == "bfloat16", operation
    assert graph.cancelling() == []


def flash_arguments(parts, operation):
    """FlashAttentionScore's or its gradient's constants: heads, keep_prob, scale, …, layout BSND, sparse_mode 2."""
    keep_prob = pytest.approx(0.9) if parts.config.attention_dropout else 1.0
    assert operation.constants[-8:] == [4, keep_prob, 0.25, LARGEST, LARGEST, 0, 3, 2]


def test_block_forward(parts):
    graph = export(BlockForward(parts.functions), bfloat16(parts.rows, 64), *parts.tables, *parts.drops, *parts.weights)
    counts = graph.counts()
    assert {name: counts[name] for name in ("FlashAttentionScore", "RmsNorm", "RotaryPositionEmbedding", "Swiglu")} \
        == {"FlashAttentionScore": 1, "RmsNorm": 2, "RotaryPositionEmbedding": 2, "Swiglu": 1}
    flash = graph.named("FlashAttentionScore")[0]
    flash_arguments(parts, flash)
    # The causal mask is an input that all graphs share; there is no bias and no padding.
    assert graph.types[flash.inputs[6]] == ("uint8", (2048, 2048))
    assert [flash.constants[place] for place in (3, 5, 7, 8, 9)] == ["none"] * 5
    if parts.config.attention_dropout:
        assert graph.types[flash.inputs[4]] == ("uint8", (2, 4, 16, 2))
    else:
        assert flash.constants[4] == "none"
        print(f"block forward: {graph.kernels()} kernels", counts)
        assert graph.kernels() <= FORWARD_BUDGET
    for rotation in graph.named("RotaryPositionEmbedding"):
        assert rotation.constants[3] == 0, "rotate-half"
    for norm in graph.named("RmsNorm"):
        assert norm.constants[2] == pytest.approx(1e-5)
        assert norm.outputs[1][0] == "float32", "the statistics"
    check_clean(graph)


def test_block_backward(parts):
    graph = export(BlockBackward(parts.functions), bfloat16(parts.rows, 64), *parts.kept(), *parts.tables, *parts.drops,
                   *parts.weights)
    counts = graph.counts()
    gradients = ("FlashAttentionScoreGrad", "RmsNormGrad", "RotaryPositionEmbeddingGrad", "SwigluGrad")
    assert [counts[name] for name in gradients] == [1, 2, 2, 1]
    # The cheap rest is computed again; of the 18 products of both passes only the gradients' 12 are there.
    assert [counts[name] for name in ("FlashAttentionScore", "RmsNorm", "Swiglu")] == [1, 2, 1]
    assert counts["MatMul"] == 12 and "Dense" not in counts
    flash_arguments(parts, graph.named("FlashAttentionScoreGrad")[0])
    if not parts.config.attention_dropout:
        print(f"block backward: {graph.kernels()} kernels", counts)
        assert graph.kernels() <= BACKWARD_BUDGET
    check_clean(graph)


def test_head_and_loss(parts):
    head = Method(HeadLoss(parts.config, parts.kernels), "backward")
    graph = export(head, bfloat16(parts.rows, 64), int32(8), int32(8), float32(8), bfloat16(64), bfloat16(96, 64))
    counts = graph.counts()
    names = ("CrossEntropyLoss", "CrossEntropyLossGrad", "RmsNorm", "RmsNormGrad", "MatMul")
    assert [counts[name] for name in names] == [1, 1, 1, 1, 3]
    loss = graph.named("CrossEntropyLoss")[0]
    assert graph.types[loss.inputs[0]] == ("float32", (8, 96)), "the softmax is computed in float32"
    check_clean(graph)


def test_embedding(parts):
    embed = Embed(parts.config, ms.bfloat16, parts.kernels)
    ids = int32(parts.rows)
    assert "Gather" in export(embed, ids, None, bfloat16(96, 64)).counts()
    backward = export(Method(embed, "backward"), bfloat16(parts.rows, 64), ids, None, bfloat16(96, 64))
    assert backward.counts()["UnsortedSegmentSum"] == 1


def test_update_and_sums(parts):
    """AdamW on float32 masters and moments with float32 gradients, its step one less than the update's number."""
    scalars = parts.kernels.adamw_scalars(3, 1e-3, (0.9, 0.95), 1e-8, 0.1)
    assert scalars[0].asnumpy() == 2
    state = [float32(4, 4), float32(4)]
    graph = export(Update(parts.kernels), float32(), *scalars, *state, *state, *state, bfloat16(4, 4), bfloat16(4))
    assert graph.counts()["AdamW"] == 2
    for operation in graph.named("AdamW"):
        assert {graph.types[name][0] for name in operation.inputs[:3]} == {"float32"}
        assert operation.constants[11:13] == [False, False], "neither amsgrad nor maximize"
    assert export(Accumulate(), bfloat16(4, 4), bfloat16(4, 4)).counts() == {"Add": 1}
    norm = export(SquaredNorm(), bfloat16(4, 4), bfloat16(4))
    assert norm.named("Concat")[0].outputs[0][0] == "float32"


def test_long_sequences_and_alibi():
    """Nothing of S × S: the shared causal mask, and ALiBi's last 1024 rows as bias."""
    length = 2304
    for fields in ({}, dict(position_embedding="alibi")):
        parts = Parts(batch=1, length=length, **fields)
        graph = export(BlockForward(parts.functions), bfloat16(length, 64), *parts.tables, None, None, None,
                       *parts.weights)
        sizes = [shape for _, shape in (*graph.constants, *graph.types.values()) if shape.count(length) > 1]
        assert sizes == []
        flash = graph.named("FlashAttentionScore")[0]
        if fields:
            assert graph.types[flash.inputs[3]] == ("bfloat16", (1, 4, 1024, length))


def test_documents():
    """Conversations apart and left padding: all tokens in a row, cumulative lengths as a run-time tensor."""
    import numpy as np

    parts = Parts()
    documents = np.repeat([0, 1, 2, 3], 4)[None].repeat(2, 0)
    visible = parts.kernels.attention_tensors(parts.config, 16, documents=documents)
    assert visible[2].asnumpy().tolist() == [4, 8, 12, 16, 20, 24, 28, 32, 39]
    graph = export(BlockBackward(parts.functions), bfloat16(parts.rows, 64), *parts.kept(), *parts.tables[:2], *visible,
                   None, None, None, *parts.weights)
    flash = graph.named("FlashAttentionScoreGrad")[0]
    assert flash.constants[-8:] == [4, 1.0, 0.25, LARGEST, LARGEST, 0, 4, 2], "layout TND"
    assert flash.outputs[0] == ("bfloat16", (39, 4, 16))


def test_portable_attention_on_ascend():
    """use_flash_attention false: the other fused operations stay."""
    from telechat import TeleChat
    from tests.ascend.conftest import SIZES
    from tests.test_model import small_config

    model = TeleChat(small_config(**SIZES), "bfloat16", kernels="ascend", use_flash_attention=False)
    weights = [None if weight is None else weight.data for weight in model.transformer.h[0].weights()]
    block = BlockForward(model.transformer.h[0].functions)
    graph = export(block, bfloat16(16, 64), *model.tables(16), None, None, None, *weights)
    assert "FlashAttentionScore" not in graph.counts()
    assert graph.counts()["RmsNorm"] == 2 and graph.counts()["Softmax"] == 1
