"""tools/generate.py under msrun: the tokens of one process, told by rank 0 alone."""

import json
import re
import subprocess
import sys

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from telechat.config import TeleChatConfig
from telechat.quantization.quantise import quantise
from tests.adapter_files import write_adapter
from tests.conftest import ROOT, save_small_model
from tests.distributed.job import run_job

GENERATE = ROOT / "tools/generate.py"
QUESTIONS = ["<_user>生抽与老抽的区别？<_bot>", "<_user>月亮自己会发光吗？<_bot>", "<_user>为什么天空是蓝色的？<_bot>"]
# The vocabulary is that of the sample tokenizer, which neither 4 nor its number of heads divides evenly.
MODEL = dict(vocab_size=1666, hidden_size=64, n_layer=3, n_head=8, num_key_value_heads=4, ffn_hidden_size=96,
             tie_word_embeddings=True, initializer_range=0.5)


@pytest.fixture(scope="module", params=["rotary", pytest.param("alibi", marks=pytest.mark.wide)])
def checkpoint(request, tmp_path_factory):
    """A random model with grouped heads, rotary or ALiBi, and the sample tokenizer."""
    folder = tmp_path_factory.mktemp(request.param) / "checkpoint"
    save_small_model(folder, seed=5, **MODEL, position_embedding=request.param)
    return folder


def alone(*arguments, text=""):
    result = subprocess.run([sys.executable, str(GENERATE), *map(str, arguments)], input=text, capture_output=True,
                            encoding="utf-8", timeout=120)
    assert result.returncode == 0, result.stderr
    return result.stdout


def shown(log):
    """What the program itself printed: left out are MindSpore's messages, which may end a line of its own, and progress."""
    return re.sub(r"\[(INFO|WARNING|ERROR)\] [A-Z_]+\(\d+,.*\n|^progress: .*\n", "", log, flags=re.MULTILINE)


def place(rank, size):
    return f"rank {rank}/{size}: pipeline 0/1, data 0/1, tensor {rank}/{size}\n"


def test_four_processes_give_the_tokens_of_one(checkpoint, tmp_path):
    """Prompts of different lengths together, sampled with a seed and a penalty; the four guess ahead."""
    (tmp_path / "questions.jsonl").write_text("\n".join(json.dumps({"input": text}) for text in QUESTIONS),
                                              encoding="utf-8")
    arguments = ["--load_checkpoint", checkpoint, "--input_file", tmp_path / "questions.jsonl", "--independent",
                 "--max_new_tokens", 24, "--repetition_penalty", 1.3, "--temperature", 0.7, "--seed", 11]
    expected = alone(*arguments)
    assert len(set(expected)) > 40  # the model says something
    job = run_job(tmp_path, 4, GENERATE, *arguments, "--speculate", 3)
    assert [shown(log) for log in job.logs] == [place(0, 4) + expected, *(place(rank, 4) for rank in (1, 2, 3))]


@pytest.mark.parametrize("bits, adapted", [(4, True), pytest.param(8, False, marks=pytest.mark.wide)])
def test_quantised_weights_are_shared(checkpoint, tmp_path, bits, adapted):
    """Two processes hold half of each product, the row-parallel ones cut within a group of 32, and of an adapter beside it."""
    quantise(checkpoint, tmp_path / "quantised", bits, 32, say=lambda line: None)
    arguments = ["--load_checkpoint", tmp_path / "quantised", "--predict_data", QUESTIONS[0], "--max_new_tokens", 16]
    if adapted:
        arguments += ["--lora", write_adapter(tmp_path / "adapter", TeleChatConfig.from_pretrained(checkpoint), 3, size=0.3)]
    expected = alone(*arguments)
    assert len(set(expected)) > 10
    job = run_job(tmp_path, 2, GENERATE, *arguments)
    assert [shown(log) for log in job.logs] == [place(0, 2) + expected, place(1, 2)]


@pytest.mark.wide
def test_act_order_is_refused_once(checkpoint, tmp_path):
    """Each process would need inputs of all groups; several processes say so in one sentence."""
    quantise(checkpoint, tmp_path / "quantised", 4, 32, say=lambda line: None)
    tensors, random = load_file(tmp_path / "quantised/model.safetensors"), np.random.default_rng(0)
    save_file({name: random.permutation(array) if name.endswith("g_idx") else array for name, array in tensors.items()},
              tmp_path / "quantised/model.safetensors")
    job = run_job(tmp_path, 2, GENERATE, "--load_checkpoint", tmp_path / "quantised", "--predict_data", QUESTIONS[0], check=False,
                  timeout=60)
    assert job.exit_code != 0
    said = [line for log in job.logs for line in log.splitlines() if line.startswith("error: ")]
    assert len(said) == 1 and "quantised with act-order (desc_act), which several processes cannot share" in said[0]


def test_interactive_chat(checkpoint, tmp_path):
    """Two turns, the second of which sees the first; typed at process 0 only."""
    typed = "月亮自己会发光吗？\n为什么？\n/clear\n为什么？\n/exit\n"
    arguments = ["--load_checkpoint", checkpoint, "--max_new_tokens", 12]
    expected = alone(*arguments, text=typed)
    job = run_job(tmp_path, 2, GENERATE, *arguments, text=typed)
    assert [shown(log) for log in job.logs] == [place(0, 2) + expected, place(1, 2)]


def test_a_model_that_does_not_divide_is_refused_once(checkpoint, tmp_path):
    job = run_job(tmp_path, 3, GENERATE, "--load_checkpoint", checkpoint, "--predict_data", QUESTIONS[0], check=False,
                  timeout=60)
    assert job.exit_code != 0
    said = [line for log in job.logs for line in log.splitlines() if line.startswith("error: ")]
    assert len(said) == 1 and "parallel.tensor 3" in said[0] and "n_head 8" in said[0]
