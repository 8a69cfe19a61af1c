"""tools/evaluate.py on two tensor-parallel processes."""

import json
import os
import shutil
import subprocess
import sys

from tests.conftest import ROOT, save_small_model


def test_two_processes_score_as_one(msrun, tmp_path):
    checkpoint, tool = tmp_path / "tiny", ROOT / "tools" / "evaluate.py"
    save_small_model(checkpoint, training_seqlen=256)
    lines = [{"text": "天空为什么是蓝色的" * number} for number in range(1, 7)]
    (tmp_path / "lines.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    flags = ["--load_checkpoint", checkpoint, "--task", "jsonl", "--data", tmp_path / "lines.jsonl", "--output_dir"]
    subprocess.run([sys.executable, tool, *flags, tmp_path / "one"], check=True, capture_output=True)
    # What an earlier run left is done by neither process again.
    os.makedirs(tmp_path / "two")
    shutil.copy(tmp_path / "one" / "evaluation.json", tmp_path / "two")
    first = (tmp_path / "one" / "answers.jsonl").read_text().splitlines(keepends=True)[0]
    (tmp_path / "two" / "answers.jsonl").write_text(first)
    job = msrun(2, tool, *flags, tmp_path / "two", environment={"MS_NODE_TIMEOUT": "30"})
    assert "perplexity" in job.logs[0] and "5 of 5 sequences" in job.logs[0] and "perplexity" not in job.logs[1]
    one, two = (json.loads((tmp_path / name / "scores.json").read_text()) for name in ("one", "two"))
    assert abs(one["loss"] - two["loss"]) < 1e-5 and one["tokens"] == two["tokens"]
    assert len((tmp_path / "two" / "answers.jsonl").read_text().splitlines()) == 6
