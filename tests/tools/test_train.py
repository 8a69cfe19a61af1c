"""tools/train.py: a run end to end, interruption and resumption, and what it refuses."""

import json
import math
import os
import pathlib
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from telechat import TeleChat
from telechat.training.training_state import list_checkpoints
from tests.conftest import ROOT, assert_refused, preprocess_samples
from tests.torch_reference import TorchTeleChat

SAMPLES = ROOT / "samples"
SMALL = ["model.hidden_size=32", "model.n_layer=2", "model.n_head=4", "model.ffn_hidden_size=48", "batch_size=4",
         "warmup_steps=2", f"tokenizer={SAMPLES / 'tokenizer.model'}"]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """The shipped samples, preprocessed, an evaluation part held out."""
    return preprocess_samples(tmp_path_factory.mktemp("data") / "dataset", "--eval_share", 0.1)


def arguments(dataset, output, *more):
    return ["--config", ROOT / "configs/demo.yaml", "--train_dataset", dataset, "--output_dir", output, *SMALL,
            "--no-report", *more]


def metrics(output):
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def test_run_writes_what_it_says(dataset, tool, tmp_path):
    output = tmp_path / "run"
    result = tool("train.py", *arguments(dataset, output, "total_steps=6", "save_steps=2", "keep_checkpoints=2"))
    assert result.returncode == 0, result.stderr
    for words in ("parameters", "tokens a step", "steps       6", "memory", "GB expected"):
        assert words in result.stdout.split("step 1/6")[0]
    lines = [line for line in result.stdout.splitlines() if line.startswith("step") and "/6" in line]
    assert len(lines) == 6
    assert all(word in line for line in lines for word in ("loss", "lr", "grad", "tok/s", "left"))
    everything = result.stdout.replace(str(output), "demo/run").replace(str(dataset), "demo/data").splitlines()
    assert [line for line in everything if len(line) > 80] == []
    assert "in browser: python tools/serve.py --load_checkpoint demo/run/final" in everything
    records = metrics(output)
    steps = [record for record in records if "loss" in record]
    assert [record["step"] for record in steps] == [1, 2, 3, 4, 5, 6]
    # Random weights know nothing: the first loss is that of a uniform guess over 1,664 tokens.
    assert steps[0]["loss"] == pytest.approx(math.log(1664), rel=0.02)
    assert steps[-1]["loss"] < steps[0]["loss"]
    assert [record["step"] for record in records if "evaluation_loss" in record] == [2, 4, 6]
    assert (output / "loss.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert [pathlib.Path(path).name for path in list_checkpoints(output)] == ["checkpoint-000004", "checkpoint-000006"]
    assert os.readlink(output / "final") == "checkpoint-000006"
    assert {"config.json", "model.safetensors", "tokenizer.model"} <= set(os.listdir(output / "final"))
    again = tool("train.py", *arguments(dataset, output))
    assert_refused(again, output, "--resume")
    finished = tool("train.py", *arguments(dataset, output, "total_steps=6", "--resume"))
    assert finished.returncode == 0 and "step 6/6" in finished.stdout


def test_killed_and_resumed_run_equals_an_uninterrupted_one(dataset, tool, tmp_path):
    """SIGKILL at a random moment, twice; the final weights, moments and metrics are bit for bit the same."""
    # Dropout on, so that random states count too.
    options = ["total_steps=14", "save_steps=3", "keep_checkpoints=1", "model.hidden_dropout=0.1",
               "model.attention_dropout=0.1"]
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    result = tool("train.py", *arguments(dataset, whole, *options))
    assert result.returncode == 0, result.stderr
    chance = random.Random()  # a new moment at each run of the test, told on failure
    killed_at = []
    for attempt in range(2):
        command = [sys.executable, str(ROOT / "tools/train.py"),
                   *map(str, arguments(dataset, broken, *options, *(["--resume"] if attempt else [])))]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, cwd=tmp_path)
        target = chance.randint(4, 7) if attempt == 0 else chance.randint(8, 13)
        for line in process.stdout:
            if line.startswith(f"step {target:2d}/"):
                time.sleep(chance.random() * 0.2)
                break
        process.send_signal(signal.SIGKILL)
        process.wait()
        killed_at.append(line.split(" loss")[0])
    result = tool("train.py", *arguments(dataset, broken, *options, "--resume"))
    assert result.returncode == 0, (killed_at, result.stderr)
    for name in ("model.safetensors", "training_state/rank-00000.safetensors"):
        expected, actual = load_file(whole / "final" / name), load_file(broken / "final" / name)
        assert expected.keys() == actual.keys()
        assert all(np.array_equal(expected[key], actual[key]) for key in expected), (killed_at, name)
    kept = ("step", "loss", "grad_norm", "learning_rate", "evaluation_loss")
    assert ([{key: record.get(key) for key in kept} for record in metrics(whole)]
            == [{key: record.get(key) for key in kept} for record in metrics(broken)]), killed_at


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_ends_cleanly(dataset, tool, tmp_path, number):
    output = tmp_path / "run"
    command = [sys.executable, str(ROOT / "tools/train.py"),
               *map(str, arguments(dataset, output, "total_steps=1000000"))]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path)
    for line in process.stdout:
        if line.startswith("step") and " 2/" in line:
            break
    process.send_signal(number)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert "Traceback" not in err and "--resume" in out
    assert len(list_checkpoints(output)) == 1
    assert metrics(output)[-1]["step"] == int(list_checkpoints(output)[0][-6:])


def test_fine_tuned_weights_convert_to_torch(reference, dataset, tool, tmp_path):
    """Fine-tune, convert back, and let plain torch compute the same logits from the official layout."""
    from telechat.checkpoint.convert import ms_to_torch
    from telechat.data.mindrecord import write_dataset
    from telechat.data.packing import Packing

    vocabulary = TeleChat.from_pretrained(reference.directory).config.vocab_size
    random_ids = np.random.default_rng(0).integers(4, vocabulary, (6, 33)).tolist()
    packing = Packing([(ids, ids) for ids in random_ids], range(6), 33, 3)
    settings = {"max_length": 33, "tokens": {"pad": {"id": 3}}, "tokenizer": {"vocab_size": vocabulary}}
    write_dataset(str(tmp_path / "data"), {"train": packing}, settings)
    output = tmp_path / "run"
    result = tool("train.py", "--config", ROOT / "configs/finetune_12b.yaml", "--train_dataset", tmp_path / "data",
                  "--load_checkpoint", reference.directory, "--output_dir", output, "sequence_length=33",
                  "dtype=float32", "learning_rate=1e-3", "batch_size=2", "micro_batches=2")
    assert result.returncode == 0, result.stderr
    ms_to_torch(str(output / "final"), str(tmp_path / "torch"))
    index = json.loads(next(reference.official.glob("*.index.json")).read_text())
    tensors = {}
    for path in sorted((tmp_path / "torch").glob("*.bin")):
        tensors.update(torch.load(path, weights_only=True))
    assert tensors.keys() == index["weight_map"].keys()
    config = json.loads((tmp_path / "torch" / "config.json").read_text())
    ids = reference.golden["input_ids"]
    expected = TorchTeleChat(config, tensors)(torch.tensor(ids).long()).numpy()
    tuned = TeleChat.from_pretrained(output / "final")(ids).asnumpy()
    assert np.abs(tuned - expected).max() < 2e-5 * np.abs(expected).max()
    assert np.abs(tuned - reference.golden["logits"]).max() > 1e-2, "training changed the model"


def test_a_run_that_diverges_stops(dataset, tool, tmp_path):
    result = tool("train.py", *arguments(dataset, tmp_path / "run", "learning_rate=1e30", "total_steps=20",
                                         "warmup_steps=0", "max_skipped_steps=2", "max_grad_norm=0"))
    assert result.returncode == 1
    assert ": SKIPPED" in result.stdout
    assert result.stderr.splitlines()[-1].endswith(
        "2 steps in a row had a loss or gradient that is not finite; lower learning_rate or check the data, then start again: "
        "nothing has been saved yet"), "no --resume where there is nothing to resume"
    assert not list((tmp_path / "run").glob("checkpoint-*"))


def test_a_full_disk_loses_no_earlier_checkpoint(dataset, tool, tmp_path):
    """A limit on file sizes stands in for the disk: the second run's checkpoint does not fit."""
    output = tmp_path / "run"
    assert tool("train.py", *arguments(dataset, output, "total_steps=2")).returncode == 0
    before = (output / "final" / "model.safetensors").read_bytes()
    limit = f"import resource, runpy, sys; resource.setrlimit(resource.RLIMIT_FSIZE, ({len(before) // 2},) * 2); " \
            f"sys.argv[0] = {str(ROOT / 'tools/train.py')!r}; runpy.run_path(sys.argv[0], run_name='__main__')"
    result = subprocess.run([sys.executable, "-c", limit, *map(str, arguments(dataset, output, "total_steps=4", "--resume"))],
                            capture_output=True, text=True, cwd=tmp_path)
    assert_refused(result, "checkpoint-000004", "File too large")
    assert sorted(path.name for path in output.iterdir() if "checkpoint" in path.name) == ["checkpoint-000002"]
    assert (output / "final" / "model.safetensors").read_bytes() == before
    assert tool("train.py", *arguments(dataset, output, "total_steps=4", "--resume")).returncode == 0


@pytest.mark.parametrize("change, words", [
    (["sequence_length=128"], ["160", "128"]),
    (["model.vocab_size=100"], ["1664", "100"]),
    (["model.training_seqlen=64"], ["160", "64", "training_seqlen"]),
    (["learning_rat=1"], ["learning_rat", "learning_rate"]),
    (["learning_rate=-1"], ["learning_rate"]),
    (["model=null"], ["--load_checkpoint"]),
    (["--load_checkpoint", "absent"], ["absent"]),
    (["--resume"], ["--resume", "no checkpoint"]),
    (["tokenizer=absent"], ["absent"]),
    (["--output_dir", "/proc/none"], ["/proc"]),
    (["--train_dataset", "absent"], ["absent"]),
    (["--outptu_dir", "x"], ["--outptu_dir"]),
])
def test_bad_input_is_refused_before_anything_is_written(dataset, tool, tmp_path, change, words):
    output = tmp_path / "run"
    assert_refused(tool("train.py", *arguments(dataset, output, *change)), *words)
    assert not output.exists()


def test_truncated_checkpoint_and_other_architecture_are_refused(reference, dataset, tool, tmp_path):
    import shutil

    damaged = tmp_path / "damaged"
    shutil.copytree(reference.directory, damaged)
    content = (damaged / "model.safetensors").read_bytes()
    (damaged / "model.safetensors").write_bytes(content[:len(content) // 2])
    run = ["--load_checkpoint", damaged, "sequence_length=null", "tokenizer=null"]
    assert_refused(tool("train.py", *arguments(dataset, tmp_path / "run", *run)), "1664 tokens", "embedding")
    config = json.loads((damaged / "config.json").read_text())
    config["vocab_size"] = 1664  # a file for another vocabulary, so that the data fits
    (damaged / "config.json").write_text(json.dumps(config))
    assert_refused(tool("train.py", *arguments(dataset, tmp_path / "run", *run)), "model.safetensors")
    (damaged / "model.safetensors").write_bytes(content)
    assert_refused(tool("train.py", *arguments(dataset, tmp_path / "run", *run)), "word_embeddings.weight", "1664")
    assert not (tmp_path / "run").exists()


def test_profile_and_loss_scale(dataset, tool, tmp_path):
    """Two profiled steps of a float16 run: a table of operations, and the loss scale in line and metrics."""
    output = tmp_path / "run"
    result = tool("train.py", *arguments(dataset, output, "total_steps=5", "save_steps=0", "dtype=float16",
                                         "loss_scale=512", "--profile", "2"))
    assert result.returncode == 0, result.stderr
    assert f"profile     2 steps in {output / 'profile'}" in result.stdout
    table = result.stdout.split("operation                   calls")[1].splitlines()[1:]
    names = [line.split()[0] for line in table if line.startswith(" " * 12)]
    assert "MatMul" in names and len(names) > 5
    assert list((output / "profile").rglob("cpu_op_type_info_*.csv"))
    assert "scale 512" in result.stdout
    assert [record["loss_scale"] for record in metrics(output) if "loss" in record] == [512.0] * 5


@pytest.mark.parametrize("override, words", [
    (["use_flash_attention=true"], ["use_flash_attention", "CPU"]), (["kernels=ascend"], ["kernels", "CPU"]),
    (["kernels=gpu"], ["kernels", "ascend", "portable"]), (["dtype=int8"], ["dtype", "bfloat16"]),
    (["loss_scale=0"], ["loss_scale"]), (["--profile", "0"], ["--profile"]),
])
def test_what_the_device_cannot_do_is_refused(dataset, tool, tmp_path, override, words):
    assert_refused(tool("train.py", *arguments(dataset, tmp_path / "run", *override)), *words)
    assert not (tmp_path / "run").exists()
