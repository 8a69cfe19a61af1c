"""Whole runs that train an adapter: broken off and gone on with, beside quantised weights, and what they are asked meanwhile."""

import json
import random
import shutil
import subprocess
import sys
import time

import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file

from telechat import Generator, InputError, SamplingParams, TeleChat
from telechat.data.mixture import MixtureFile
from telechat.data.packed_dataset import PackedDataset
from telechat.data.preprocess import preprocess
from telechat.data.tokenizer import Tokenizer
from telechat.nn.cpu.build import load_library
from telechat.quantization.quantise import quantise
from telechat.training.run import TrainingRun
from telechat.training.run_config import RunConfig
from telechat.training.sample_answers import LONGEST_ANSWER, first_prompts
from tests.conftest import ROOT, save_small_model


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """The sample conversations, preprocessed."""
    path = tmp_path_factory.mktemp("data") / "dataset"
    preprocess([MixtureFile(str(ROOT / "samples/conversations.jsonl"))],
               Tokenizer.from_pretrained(ROOT / "samples/tokenizer.model"), str(path), 64)
    return path


def settings(dataset, base, output, **more):
    """A `RunConfig` as a file holds it."""
    return {"train_dataset": str(dataset), "load_checkpoint": str(base), "output_dir": str(output), "learning_rate": 1e-2,
            "lora": {"rank": 2, "alpha": 4}, **more}


def run(values, **options):
    return TrainingRun(RunConfig.from_dict(values), **options).run()


def assert_same(one, other, *files):
    """All tensors in these files of both directories are the same to the last bit."""
    for file in files:
        expected, found = load_file(one / file), load_file(other / file)
        assert expected.keys() == found.keys() and all(np.array_equal(expected[name], found[name]) for name in expected), file


def test_a_killed_run_that_goes_on_equals_an_unbroken_one(dataset, tmp_path):
    """SIGKILL at a random moment, in a step or while it saves, with dropout: adapter, moments and metrics."""
    save_small_model(tmp_path / "model")
    values = settings(dataset, tmp_path / "model", tmp_path / "whole", total_steps=12, save_steps=1, keep_checkpoints=2,
                      lora={"rank": 2, "alpha": 4, "dropout": 0.2})
    run(values)
    values["output_dir"] = str(tmp_path / "broken")
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(values))
    process = subprocess.Popen([sys.executable, str(ROOT / "tools/train.py"), "--config", str(tmp_path / "run.yaml"), "--no-report"],
                               stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, cwd=tmp_path)
    chance = random.Random()  # a new moment at each run of the test, told on failure
    step, pause = chance.randint(2, 9), chance.random() * 0.02
    next(line for line in process.stdout if line.startswith(f"step {step:2d}/"))
    time.sleep(pause)
    process.kill()
    process.communicate()
    assert not (tmp_path / "broken/final").exists()
    run(values, resume=True)
    try:
        assert_same(tmp_path / "whole/final", tmp_path / "broken/final", "adapter_model.safetensors",
                    "training_state/rank-00000.safetensors")
        kept = [[[record.get(key) for key in ("step", "loss", "grad_norm", "learning_rate")] for record in
                 map(json.loads, (tmp_path / name / "metrics.jsonl").read_text().splitlines())] for name in ("whole", "broken")]
        assert kept[0] == kept[1]
    except AssertionError as error:
        raise AssertionError(f"killed {pause:.4f} s behind step {step}") from error


def test_a_run_beside_quantised_products(dataset, tmp_path):
    """tools/train.py's own run on a directory of tools/quantize.py, broken off and gone on with, bit for bit."""
    save_small_model(tmp_path / "model")
    quantise(tmp_path / "model", tmp_path / "q", 4, 16, say=lambda line: None)
    values = settings(dataset, tmp_path / "q", tmp_path / "a", total_steps=2, save_steps=1)
    run(values)
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    shutil.rmtree(tmp_path / "b/checkpoint-000002")
    shutil.rmtree(tmp_path / "b/final", ignore_errors=True)
    run({**values, "output_dir": str(tmp_path / "b")}, resume=True)
    assert_same(tmp_path / "a/checkpoint-000002", tmp_path / "b/checkpoint-000002", "adapter_model.safetensors")
    with pytest.raises(InputError, match="which only answer, are evaluated and have adapters trained beside them"):
        run({**values, "lora": None, "output_dir": str(tmp_path / "c")})


def test_a_run_goes_on_beside_the_same_base_alone(dataset, tmp_path):
    save_small_model(tmp_path / "model")
    run(settings(dataset, tmp_path / "model", tmp_path / "out", total_steps=1))
    shutil.move(tmp_path / "model", tmp_path / "moved")
    again = settings(dataset, tmp_path / "moved", tmp_path / "out", total_steps=2)
    assert run(again, resume=True)[1]
    save_small_model(tmp_path / "moved", seed=1)
    with pytest.raises(InputError, match="checkpoint-000002 was written with base.model.safetensors '[0-9a-f]+.*, this run has"):
        run({**again, "total_steps": 3}, resume=True)


@pytest.mark.parametrize("kernels, bits", [("cpu", 4), ("portable", None)])
def test_sample_answers_are_those_of_the_adapter_so_far(dataset, tmp_path, kernels, bits):
    """Each checkpoint's answers are what the base says with that checkpoint's adapter; training is as it is without them."""
    if kernels == "cpu" and load_library() is None:
        pytest.skip("there is no C++ compiler here")
    base = tmp_path / "model"
    save_small_model(base)
    if bits:
        base = tmp_path / "q"
        quantise(tmp_path / "model", base, bits, 16, say=lambda line: None)
    values = settings(dataset, base, tmp_path / "asked", total_steps=2, save_steps=1, learning_rate=0.5, kernels=kernels,
                      warmup_steps=0, lora={"rank": 4, "alpha": 16})
    run(values, report=True)
    if kernels == "cpu":
        run({**values, "output_dir": str(tmp_path / "quiet")})
        assert_same(tmp_path / "asked/final", tmp_path / "quiet/final", "adapter_model.safetensors")
    found = [json.loads(line) for line in (tmp_path / "asked/answers.jsonl").read_text().splitlines()]
    data, tokenizer = PackedDataset(str(dataset), 1), Tokenizer.from_pretrained(base)
    end = data.info["settings"]["tokens"]["end"]["id"]
    said = []
    for step in (1, 2):
        model = TeleChat.from_pretrained(base, lora=tmp_path / f"asked/checkpoint-{step:06d}")
        params = SamplingParams(LONGEST_ANSWER, stop_ids=(end,), excluded_ids=tokenizer.missing_ids(model.config.vocab_size))
        answers = Generator(model, max_length=512).generate(first_prompts(data), params)
        said.append([tokenizer.decode(ids, skip_control_tokens=True) for ids in answers])
    assert [record["answer"] for record in found] == said[0] + said[1] and len(said[0]) == 3
    assert said[0] != said[1]
