"""Graphs of training on Ascend that no test runs on the simulated card, where their kernels are counted (test_budget.py)."""

from telechat.nn.block_graphs import Attention
from tests.ascend.conftest import Parts, bfloat16
from tests.ascend.mindir import export


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
