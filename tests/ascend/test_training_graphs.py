"""The graphs of a training step on Ascend: fused operations, their arguments and gradients, and nothing to spare."""

import mindspore as ms
import pytest

from telechat.nn.block_graphs import Attention
from telechat.nn.graphs import Accumulate, Embed, HeadLoss, SquaredNorm, Update
from tests.ascend.conftest import Method, Parts, bfloat16, float32, int32
from tests.ascend.mindir import export

FORWARD_BUDGET = 16  # kernels of a block's forward pass, without dropout
BACKWARD_BUDGET = 34
LARGEST = 2147483647


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
    attention, feed_forward = export(*parts.attention()[0]), export(*parts.feed_forward()[0])
    counts = attention.counts()
    assert {name: counts[name] for name in ("FlashAttentionScore", "RmsNorm", "RotaryPositionEmbedding")} \
        == {"FlashAttentionScore": 1, "RmsNorm": 1, "RotaryPositionEmbedding": 2}
    assert [feed_forward.counts()[name] for name in ("RmsNorm", "Swiglu")] == [1, 1]
    flash = attention.named("FlashAttentionScore")[0]
    flash_arguments(parts, flash)
    # The causal mask is an input that all graphs share; there is no bias and no padding.
    assert attention.types[flash.inputs[6]] == ("uint8", (2048, 2048))
    assert [flash.constants[place] for place in (3, 5, 7, 8, 9)] == ["none"] * 5
    if parts.config.attention_dropout:
        assert attention.types[flash.inputs[4]] == ("uint8", (2, 4, 16, 2))
    else:
        assert flash.constants[4] == "none"
        kernels = attention.kernels() + feed_forward.kernels()
        print(f"block forward: {kernels} kernels", counts, feed_forward.counts())
        assert kernels <= FORWARD_BUDGET
    for rotation in attention.named("RotaryPositionEmbedding"):
        assert rotation.constants[3] == 0, "rotate-half"
    for norm in (*attention.named("RmsNorm"), *feed_forward.named("RmsNorm")):
        assert norm.constants[2] == pytest.approx(1e-5)
        assert norm.outputs[1][0] == "float32", "the statistics"
    check_clean(attention)
    check_clean(feed_forward)


def test_block_backward(parts):
    attention, feed_forward = export(*parts.attention()[1]), export(*parts.feed_forward()[1])
    counts = attention.counts()
    # A rotation's gradient is the rotation back.
    gradients = ("FlashAttentionScoreGrad", "RmsNormGrad", "RotaryPositionEmbedding")
    assert [counts[name] for name in gradients] == [1, 1, 2] and "RotaryPositionEmbeddingGrad" not in counts
    assert [feed_forward.counts()[name] for name in ("RmsNormGrad", "SwigluGrad")] == [1, 1]
    # The cheap rest is computed again; of the 18 products of both passes only the gradients' 12 are there.
    assert [counts[name] for name in ("FlashAttentionScore", "RmsNorm")] == [1, 1]
    assert [feed_forward.counts()[name] for name in ("RmsNorm", "Swiglu")] == [1, 1]
    assert counts["MatMul"] == 6 and feed_forward.counts()["MatMul"] == 6
    assert not any("Dense" in graph.counts() for graph in (attention, feed_forward))
    flash_arguments(parts, attention.named("FlashAttentionScoreGrad")[0])
    if not parts.config.attention_dropout:
        kernels = attention.kernels() + feed_forward.kernels()
        print(f"block backward: {kernels} kernels", counts, feed_forward.counts())
        assert kernels <= BACKWARD_BUDGET
    check_clean(attention)
    check_clean(feed_forward)


def test_recomputation(parts):
    """Gate and up are made again from the middle of the block; the forward graph of attention runs twice."""
    counts = export(*parts.feed_forward(recompute=True)[1]).counts()
    assert counts["MatMul"] == 8 and counts["Swiglu"] == 1, "not the product whose result only the output needs"


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
    sums = export(Accumulate(parts.kernels), bfloat16(4, 4), bfloat16(4, 4)).counts()
    assert sums["InplaceAddExt"] == 1 and sums["Cast"] >= 1, "a sum in float32, in place"
    norm = export(SquaredNorm(parts.kernels), bfloat16(4, 4), bfloat16(4))
    assert norm.named("Concat")[0].outputs[0][0] == "float32"


def test_long_sequences_and_alibi():
    """Nothing of S × S: the shared causal mask, and ALiBi's last 1024 rows as bias."""
    length = 2304
    for fields in ({}, dict(position_embedding="alibi")):
        parts = Parts(batch=1, length=length, **fields)
        graph = export(*parts.attention()[0])
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
    graph = export(*parts.attention(visible)[1])
    flash = graph.named("FlashAttentionScoreGrad")[0]
    assert flash.constants[-8:] == [4, 1.0, 0.25, LARGEST, LARGEST, 0, 4, 2], "layout TND"
    assert flash.outputs[0] == ("bfloat16", (39, 4, 16))


@pytest.mark.parametrize("fields, documents", [
    (dict(position_embedding="alibi", attention_dropout=0.1), False),
    (dict(position_embedding="alibi"), True),
    (dict(attention_dropout=0.1), True),
    (dict(position_embedding="alibi", attention_dropout=0.1), True),
], ids=["ALiBi and dropout", "documents and ALiBi", "documents and dropout", "all"])
def test_combinations(fields, documents):
    """With documents a mask of all tokens: in layout TND bias and dropout mask change their shapes with the lengths."""
    import numpy as np

    parts = Parts(**fields)
    apart = np.repeat([0, 1, 2, 3], 4)[None].repeat(2, 0) if documents else None
    alibi, dropout = "position_embedding" in fields, "attention_dropout" in fields
    visible = parts.kernels.attention_tensors(parts.config, 16, documents=apart, dropout=dropout)
    assert visible[2] is None
    for (cell, *inputs), name in zip(parts.attention(visible), ("FlashAttentionScore", "FlashAttentionScoreGrad")):
        graph = export(cell, *inputs)
        assert [graph.counts().get(other, 0) for other in (name, "Softmax")] == [1, 0]
        flash = graph.named(name)[0]
        # The scale is in the queries where there is a bias.
        assert flash.constants[-8:] == [4, pytest.approx(0.9) if dropout else 1.0, 1.0 if alibi else 0.25, LARGEST,
                                        LARGEST, 0, 3, 0 if documents else 2]
        types = [graph.types[value] for value in flash.inputs if value in graph.types]
        assert (("bfloat16", (1, 4, 16, 16)) in types, ("uint8", (2, 4, 16, 2)) in types) == (alibi, dropout)
        assert (("uint8", (2, 1, 16, 16)) in types, ("uint8", (2048, 2048)) in types) == (documents, not documents)
        check_clean(graph)


def test_dropout_of_a_length_that_flash_attention_does_not_take():
    """Portable attention on heads that lie as flash attention wants them."""
    parts = Parts(length=12, attention_dropout=0.1)
    (cell, *inputs), _ = parts.attention(parts.kernels.attention_tensors(parts.config, 12, dropout=True))
    counts = export(cell, *inputs).counts()
    assert counts["Softmax"] == 1 and "FlashAttentionScore" not in counts


def test_portable_attention_on_ascend():
    """use_flash_attention false: the other fused operations stay."""
    from telechat import TeleChat
    from tests.ascend.conftest import SIZES
    from tests.test_model import small_config

    model = TeleChat(small_config(**SIZES), "bfloat16", kernels="ascend", use_flash_attention=False)
    weights = [None if weight is None else weight.data for weight in model.transformer.h[0].weights()]
    attention = Attention(model.transformer.h[0].functions)
    graph = export(attention, bfloat16(16, 64), *model.tables(16), None, None, *weights[:5])
    assert "FlashAttentionScore" not in graph.counts()
    assert graph.counts()["RmsNorm"] == 1 and graph.counts()["Softmax"] == 1
