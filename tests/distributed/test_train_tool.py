"""tools/train.py under msrun: who prints and writes, what a killed process leaves, what is refused."""

import json
import os
import random
import shutil
import signal
import time

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from telechat import TeleChat
from telechat.checkpoint.reader import CheckpointReader
from telechat.checkpoint.writer import write_checkpoint
from telechat.training.training_state import list_checkpoints
from tests.distributed.job import RunningJob, run_job
from tests.distributed.train_job import DEADLINE, TRAIN, arguments, refused

STEPS = 12
SAVES = ["save_steps=2", "keep_checkpoints=2"]
# Four processes that compile on two cores may send no sign of life for 5 seconds.
SOAK = {"MS_NODE_TIMEOUT": "12"}


def steps(output):
    """The metrics of every step; none may be there twice."""
    records = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    records = [record for record in records if "loss" in record]
    assert [record["step"] for record in records] == list(range(1, len(records) + 1))
    return [(record["loss"], record["grad_norm"]) for record in records]


@pytest.fixture(scope="module")
def whole(dataset, tmp_path_factory):
    """An uninterrupted run of two tensor-parallel processes: its output directory and `Job`."""
    folder = tmp_path_factory.mktemp("whole")
    job = run_job(folder, 2, TRAIN, *arguments(dataset, folder / "run", f"total_steps={STEPS}", *SAVES,
                                               "parallel.tensor=2"))
    return folder / "run", job


def test_one_process_reports_and_the_checkpoint_is_an_ordinary_one(whole):
    output, job = whole
    for rank, log in enumerate(job.logs):
        assert f"rank {rank}/2: pipeline 0/1, data 0/1, tensor {rank}/2" in log
        assert ("step " in log) == (rank == 0) and ("bubble 0.0%" in log) == (rank == 0)
    assert len(steps(output)) == STEPS
    assert os.readlink(output / "final") == f"checkpoint-{STEPS:06d}"
    model = TeleChat.from_pretrained(output / "final")
    assert model.transformer.h[0].self_attention.query.weight.shape == (32, 32)
    assert all(np.isfinite(parameter.asnumpy()).all() for parameter in model.get_parameters())


def partial_checkpoint(output):
    """Whether a checkpoint is being written."""
    return output.exists() and any("partial" in name for name in os.listdir(output))


def kill_when(due, start, rank):
    """Start a job, SIGKILL one rank's process once ``due()`` holds; the `Job`, None where it ended before that."""
    running = start()
    worker = None
    while running.process.poll() is None:
        worker = worker or running.worker(rank)
        if worker is not None and due():
            worker.kill()
            job = running.finish(DEADLINE, check=False)
            assert job.exit_code != 0
            return job
        time.sleep(0.0005)
    running.finish()
    return None


def check_equal(output, expected):
    """The two runs' metrics and final checkpoints are the same to the last bit."""
    assert steps(output) == steps(expected)
    ours, theirs = ((folder / "final").resolve() for folder in (output, expected))
    for path in sorted(theirs.rglob("*.safetensors")):
        wanted, found = load_file(path), load_file(ours / path.relative_to(theirs))
        assert wanted.keys() == found.keys()
        assert all(np.array_equal(wanted[name], found[name]) for name in wanted), path.name


@pytest.mark.parametrize("moment", ["training", "saving"])
def test_killed_and_resumed_equals_uninterrupted(moment, whole, dataset, tmp_path):
    """SIGKILL of either process: the job ends within a minute, the last checkpoint is whole, --resume goes on."""
    output = tmp_path / "run"
    command = [TRAIN, *arguments(dataset, output, f"total_steps={STEPS}", *SAVES, "parallel.tensor=2")]

    def due():
        if moment == "saving":
            return bool(list_checkpoints(output)) and partial_checkpoint(output)
        return output.exists() and (output / "metrics.jsonl").exists() and len(steps(output)) >= 5

    rank = 1 if moment == "training" else 0
    assert kill_when(due, lambda: RunningJob(tmp_path, 2, *command), rank) is not None
    assert list_checkpoints(output)
    for path in list_checkpoints(output):
        TeleChat.from_pretrained(path)  # whatever carries a checkpoint's name is whole
    run_job(tmp_path, 2, *command, "--resume")
    check_equal(output, whole[0])


@pytest.mark.soak
def test_soak(dataset, tmp_path):
    """Ten kills at random moments of a run of four processes; no trace differs from the uninterrupted one."""
    total, kills = 120, 10
    settings = [f"total_steps={total}", *SAVES, "parallel.tensor=2", "parallel.shard_optimizer=true"]
    expected, output = tmp_path / "expected", tmp_path / "run"
    run_job(tmp_path, 4, TRAIN, *arguments(dataset, expected, *settings), timeout=600, environment=SOAK)
    seed = random.randrange(2 ** 32)
    print("seed", seed)
    chance = random.Random(seed)

    def command():
        """Goes on where there is something to go on from, else begins anew."""
        if list_checkpoints(output):
            return [TRAIN, *arguments(dataset, output, *settings), "--resume"]
        shutil.rmtree(output, ignore_errors=True)
        return [TRAIN, *arguments(dataset, output, *settings)]

    for number in range(kills):
        # 0 steps: while the processes find each other, read the checkpoint, compile.
        rank, after = chance.randrange(4), chance.randint(0, total // kills)
        wait = chance.random() * (0.3 if after else 12)
        begin = command()
        enough = min(count_lines(output) + after, total - 2)

        def due():
            if count_lines(output) < enough:
                return False
            time.sleep(wait)
            return True

        job = kill_when(due, lambda: RunningJob(tmp_path, 4, *begin, environment=SOAK), rank)
        print(f"kill {number}: rank {rank} at {after} steps more, {count_lines(output)} in all,",
              "too late" if job is None else f"{job.seconds:.0f} s", flush=True)
        assert job is not None
        for path in list_checkpoints(output):
            TeleChat.from_pretrained(path)
    run_job(tmp_path, 4, *command(), timeout=600, environment=SOAK)
    check_equal(output, expected)


def count_lines(output):
    path = output / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def test_another_batch_size_on_resuming(whole, dataset, tmp_path):
    output = tmp_path / "run"
    shutil.copytree(whole[0], output, symlinks=True)
    job = run_job(tmp_path, 2, TRAIN, *arguments(dataset, output, f"total_steps={STEPS}", *SAVES, "parallel.tensor=2",
                                                 "--resume", "batch_size=2"), check=False, timeout=DEADLINE)
    refused(job, "batch_size", "2", "4")


def test_a_checkpoint_that_lacks_a_slice(whole, dataset, tmp_path):
    """One tensor is cut short, another one missing."""
    source = tmp_path / "broken"
    shutil.copytree((whole[0] / "final").resolve(), source)
    tensors = load_file(source / "model.safetensors")
    name = "transformer.h.1.mlp.down_proj.weight"
    del tensors["transformer.h.0.input_layernorm.weight"]
    save_file({**tensors, name: tensors[name][:, :24].copy()}, source / "model.safetensors")
    job = run_job(tmp_path, 2, TRAIN, *arguments(dataset, tmp_path / "run", "--load_checkpoint", source),
                  check=False, timeout=DEADLINE)
    refused(job, name, "(32, 24)", "(32, 48)", "1 missing: transformer.h.0.input_layernorm.weight")


@pytest.mark.wide
def test_a_checkpoint_that_lacks_a_file(whole, dataset, tmp_path):
    reader = CheckpointReader((whole[0] / "final").resolve())
    write_checkpoint(tmp_path / "broken", reader.config, ((name, reader.read(name)) for name in reader.names), 100000)
    missing = sorted((tmp_path / "broken").glob("model-*-of-*.safetensors"))[1]
    missing.unlink()
    job = run_job(tmp_path, 2, TRAIN, *arguments(dataset, tmp_path / "run", "--load_checkpoint", tmp_path / "broken"),
                  check=False, timeout=DEADLINE)
    refused(job, missing.name, "which is not there")


def test_a_training_state_that_lacks_a_slice(whole, dataset, tmp_path):
    """The state of the second process is gone: the checkpoint that is asked for is refused by name."""
    output = tmp_path / "run"
    shutil.copytree(whole[0], output, symlinks=True)
    newest = list_checkpoints(output)[-1]
    files = sorted(path for path in os.listdir(os.path.join(newest, "training_state")) if path.endswith(".safetensors"))
    os.remove(os.path.join(newest, "training_state", files[-1]))
    job = run_job(tmp_path, 2, TRAIN, *arguments(dataset, output, "total_steps=14", *SAVES, "parallel.tensor=2",
                                                 "--resume_from", newest), check=False, timeout=DEADLINE)
    refused(job, newest)


def test_an_interrupt_saves_and_resumes(whole, dataset, tmp_path):
    """SIGTERM to one process alone: all finish the step, save together, and end well."""
    output = tmp_path / "run"
    command = [TRAIN, *arguments(dataset, output, f"total_steps={STEPS}", "save_steps=100", "keep_checkpoints=2",
                                 "parallel.tensor=2")]
    running = RunningJob(tmp_path, 2, *command)
    while running.process.poll() is None and "step  3/" not in running.log(0):
        time.sleep(0.001)
    running.worker(1).send_signal(signal.SIGTERM)
    job = running.finish(DEADLINE)
    assert "interrupted at step" in job.logs[0] and len(list_checkpoints(output)) == 1
    run_job(tmp_path, 2, *command, "--resume")
    check_equal(output, whole[0])
