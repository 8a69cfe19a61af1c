"""Graphs of training on Ascend that no test runs on the simulated card, where their kernels are counted (test_budget.py)."""

import pytest

from telechat.nn.block_graphs import Attention
from tests.ascend.conftest import Parts, bfloat16
from tests.ascend.mindir import export

LARGEST = 2147483647


def check_clean(graph):
    """Products in bfloat16, no cast or transpose that undoes another."""
    for operation in graph.operations:
        if operation.name in ("MatMul", "Dense", "BatchMatMul", "MatMulExt"):
            assert operation.outputs[0][0] == "bfloat16", operation
    assert graph.cancelling() == []


def test_recomputation(parts):
    """Gate and up are made again from the middle of the block; the forward graph of attention runs twice."""
    counts = export(*parts.feed_forward(recompute=True)[1]).counts()
    assert counts["MatMul"] == 8 and counts["Swiglu"] == 1, "not the product whose result only the output needs"


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
