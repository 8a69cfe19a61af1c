"""tools/serve.py on two and four simulated cards that share a model."""

import json
import re

import pytest

from simulator.environment import environment, unavailable
from telechat import Generator, SamplingParams, TeleChat, Tokenizer
from tests.conftest import ROOT, save_small_model
from tests.distributed.job import free_port
from tests.distributed.test_serving import check_serving
from tests.distributed.test_training import PATIENT

pytestmark = [pytest.mark.ascend, pytest.mark.skipif(unavailable() is not None, reason=str(unavailable()))]


@pytest.mark.parametrize("cards", [2, 4])
def test_cards_serve_as_one(msrun, tmp_path, cards):
    """In float32, so that the tokens are those of one CPU: put back, shared, in parts, with an adapter."""
    check_serving(msrun, tmp_path, cards, environment(base={"PYTHONPATH": str(ROOT)}, **PATIENT))


def test_the_smaller_card_counts(msrun, tmp_path):
    """Without --cache_memory both take what the one with less memory has room for, and answer from it."""
    checkpoint, slots, length = tmp_path / "tiny", 64, 1024
    save_small_model(checkpoint, training_seqlen=length, hidden_size=128)
    prompt, count = [20, *range(400, 440), 21], 8
    (tmp_path / "requests.json").write_text(json.dumps([{"model": "tiny", "prompt": prompt, "max_tokens": count}]))
    cards = environment(base={"PYTHONPATH": str(ROOT)}, HCCL_BUFFSIZE="1", **PATIENT)
    job = msrun(2, "serve_unequal.py", "210MB,200MB", checkpoint, free_port(), tmp_path / "requests.json",
                tmp_path / "answers.json", "--max_batch", slots, "--max_length", length, timeout=300, environment=cards)
    larger, smaller = ([int(number) for number in re.search(r"^this card alone: (\d+) (\d+) (\d+)$", log, re.MULTILINE).groups()]
                       for log in job.logs)
    assert larger[:2] == smaller[:2] == [slots, length] and length < smaller[2] < larger[2] < slots * length
    assert f"at a time, {smaller[2]} tokens together" in job.logs[0]
    (answer,), metrics = json.loads((tmp_path / "answers.json").read_text(encoding="utf-8"))
    blocks = re.search(r"^telechat_cache_blocks (\d+)$", metrics, re.MULTILINE)[1]
    assert int(blocks) == -(-smaller[2] // 16)
    expected, = Generator(TeleChat.from_pretrained(checkpoint), 64).generate([prompt], SamplingParams(count, stop_ids=(2,)))
    assert answer["choices"][0]["text"] == Tokenizer.from_pretrained(checkpoint).decode(expected, skip_control_tokens=True)
