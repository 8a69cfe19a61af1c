"""What the simulated card's memory holds at most, against what tools/estimate.py says."""

import pytest

from simulator.report import read, report
from telechat import TeleChatConfig
from telechat.generation.card_memory import card_memory
from telechat.generation.memory import cache_bytes

SMALL = dict(vocab_size=8000, hidden_size=512, n_layer=6, n_head=8, ffn_hidden_size=1408, tie_word_embeddings=False)
TIED = dict(vocab_size=20000, hidden_size=768, n_layer=8, n_head=6, ffn_hidden_size=2048, tie_word_embeddings=True,
            attention_dropout=0.1, hidden_dropout=0.1)
RUNS = {
    "bfloat16": dict(model=SMALL, sequence_length=2048, batch_size=2, dtype="bfloat16"),
    "float32, recompute": dict(model=SMALL, sequence_length=512, batch_size=4, dtype="float32", parallel=dict(recompute=True)),
    "bfloat16, tied, dropout, 4 micro-batches": dict(model=TIED, sequence_length=1024, batch_size=4, micro_batches=4,
                                                     dtype="bfloat16"),
    "bfloat16, no flash attention": dict(model=SMALL, sequence_length=1024, batch_size=2, dtype="bfloat16",
                                         use_flash_attention=False),
    "an adapter": dict(model=SMALL, sequence_length=512, batch_size=2, dtype="bfloat16", lora=dict(rank=16)),
    "an adapter beside 4 bits": dict(model=SMALL, sequence_length=512, batch_size=2, dtype="bfloat16", lora=dict(rank=16), bits=4),
    "an adapter beside 8 bits": dict(model=SMALL, sequence_length=512, batch_size=2, dtype="bfloat16", lora=dict(rank=16), bits=8),
}
USUAL = "bfloat16"


def usual(names, one):
    """Parameters of which one is in every run of the tests, the others in `make test-ascend`."""
    return [name if name == one else pytest.param(name, marks=pytest.mark.ascend) for name in names]


@pytest.mark.parametrize("name", usual(RUNS, USUAL))
def test_a_training_step(card, tmp_path, name):
    """Within 10 %: tensors, and what MindSpore's pool holds beside them."""
    expected = card("memory_on_card.training_memory", RUNS[name], SIM_LOG=str(tmp_path / "log"), SIM_OPERATORS="none")
    assert report(read(str(tmp_path / "log"))).peak_bytes == pytest.approx(expected, rel=0.1)


GENERATIONS = {"bfloat16": ("bfloat16", 4, 2048), "float16, 4,096 tokens": ("float16", 8, 4096), "float32": ("float32", 8, 1024)}


@pytest.mark.parametrize("name", usual(GENERATIONS, USUAL))
def test_answering(card, tmp_path, name):
    """Prompts that fill the cache and tokens of all sequences: within 10 %."""
    fields = dict(SMALL, n_head=4)
    expected = card("memory_on_card.generation_memory", fields, *GENERATIONS[name], SIM_LOG=str(tmp_path / "log"), SIM_OPERATORS="none")
    assert report(read(str(tmp_path / "log"))).peak_bytes == pytest.approx(expected, rel=0.1)


def test_a_server_takes_what_is_free_less_a_tenth(card):
    """Of a card of 1.1 GB 8 sequences of 2,048 tokens get less than they can fill; a prompt in each place fits beside."""
    fields = dict(SMALL, n_head=4)
    plan, (total, free, left, held), said = card("memory_on_card.default_cache", fields, "bfloat16", 8, 2048, SIM_MEMORY="1.1GB", SIM_OPERATORS="none")
    config = TeleChatConfig.from_dict(fields)
    parts = card_memory(config, "bfloat16", 8, 2048)
    assert total == pytest.approx(1.1 * 2 ** 30, rel=1e-6)
    assert total - free == pytest.approx(parts["weights"], rel=0.2) and free - left == pytest.approx(held, rel=0.02)
    room = free - 0.1 * total - parts["kernels"] - parts["work"]
    assert plan == [8, 2048, int(room // cache_bytes(config, 1, 1, 2))] and 2 * 2048 < plan[2] < 8 * 2048
    assert "memory" in said.lower()
