"""tools/generate.py on four simulated cards that share a model."""

import json

import pytest

from simulator.environment import environment, unavailable
from tests.conftest import ROOT, save_small_model
from tests.distributed.job import run_job
from tests.distributed.test_generate_tool import GENERATE, MODEL, QUESTIONS, alone, place, shown
from tests.distributed.test_training import PATIENT

pytestmark = [pytest.mark.ascend, pytest.mark.skipif(unavailable() is not None, reason=str(unavailable()))]


@pytest.mark.parametrize("dtype, count", [("float32", 16), ("bfloat16", 3)])
def test_four_cards_give_the_tokens_of_one_cpu(tmp_path, dtype, count):
    """float32 on a plain cache; bfloat16 by PagedAttention, where rounding may choose another token."""
    save_small_model(tmp_path / "model", seed=5, **{**MODEL, "hidden_size": 128})
    (tmp_path / "questions.jsonl").write_text("\n".join(json.dumps({"input": text}) for text in QUESTIONS), encoding="utf-8")
    arguments = ["--load_checkpoint", tmp_path / "model", "--input_file", tmp_path / "questions.jsonl", "--independent",
                 "--max_new_tokens", count, "--temperature", 0, "--dtype", dtype]
    expected = alone(*arguments).split("\n\n")
    cards = environment(base={"PYTHONPATH": str(ROOT)}, SIM_LOG=str(tmp_path / "log"), **PATIENT)
    job = run_job(tmp_path, 4, GENERATE, *arguments, environment=cards, timeout=600)
    answers = shown(job.logs[0]).partition(place(0, 4))[2].split("\n\n")
    same = sum(ours.endswith(theirs) for ours, theirs in zip(answers, expected, strict=True))
    assert same >= (4 if dtype == "float32" else 3), (answers, expected)
    assert all(place(rank, 4) in job.logs[rank] for rank in range(4))
    for rank in range(4):
        launched = (tmp_path / f"log.{rank}").read_text()
        assert ("InternalPagedAttention" in launched) == (dtype == "bfloat16")
        assert "AllReduce" in launched
