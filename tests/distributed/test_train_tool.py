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
from tests.conftest import ROOT, preprocess_samples
from tests.distributed.job import RunningJob, free_port, kill_tree, run_job

TRAIN = ROOT / "tools/train.py"
SAMPLES = ROOT / "samples"
SMALL = ["model.hidden_size=32", "model.n_layer=2", "model.n_head=4", "model.ffn_hidden_size=48", "batch_size=4",
         "warmup_steps=2", "model.hidden_dropout=0.1", f"tokenizer={SAMPLES / 'tokenizer.model'}"]
STEPS = 12
SAVES = ["save_steps=2", "keep_checkpoints=2"]
# Four processes that compile on two cores may send no sign of life for 5 seconds.
SOAK = {"MS_NODE_TIMEOUT": "12"}
DEADLINE = 60  # seconds: "all end, non-zero, within a minute"


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """The shipped samples, preprocessed."""
    return preprocess_samples(tmp_path_factory.mktemp("data") / "dataset")


def arguments(dataset, output, *more):
    return ["--config", ROOT / "configs/demo.yaml", "--train_dataset", dataset, "--output_dir", output, *SMALL, *more]


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


# ---- What is refused. On one of two processes something differs: scripts/one_rank.py


def refused(job, *words):
    """The job failed within a minute; exactly one process says one sentence with these words."""
    assert job.exit_code != 0 and job.seconds < DEADLINE
    said = [line for log in job.logs for line in log.splitlines() if line.startswith("error: ")]
    assert len(said) == 1, said
    assert all(str(word) in said[0] for word in words), said[0]
    assert not any("Traceback" in log for log in job.logs)


@pytest.fixture
def one_rank(dataset, tmp_path):
    """one_rank(common arguments, rank 1's other arguments, its other project folder, directories of both) → `Job`."""
    def call(common, other=(), project=ROOT, directories=(".", ".")):
        (tmp_path / "other.json").write_text(json.dumps({
            "arguments": list(map(str, other)), "project": str(project), "directories": directories}))
        return run_job(tmp_path, 2, "one_rank.py", tmp_path / "other.json",
                       *arguments(dataset, tmp_path / "run", "total_steps=3", *common), check=False, timeout=DEADLINE)
    return call


def test_another_configuration(one_rank, tmp_path):
    refused(one_rank([], ["learning_rate=1e-3"]), "rank 1", "another configuration", "rank 0")
    assert not (tmp_path / "run").exists()


def test_another_code_version(one_rank, tmp_path):
    copy = tmp_path / "project"
    shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".git", ".venv", "demo", "__pycache__"))
    with open(copy / "telechat/nn/kernels.py", "a", encoding="utf-8") as file:
        file.write("# a change\n")
    refused(one_rank([], project=copy), "rank 1", "another code version")


def test_another_dataset(one_rank, dataset, tmp_path):
    """Of the same name, as on another machine that was not brought up to date."""
    for folder, source in (("here", dataset), ("there", preprocess_samples(tmp_path / "other", "--seed", 1))):
        (tmp_path / folder).mkdir()
        shutil.copytree(source, tmp_path / folder / "data")
    refused(one_rank(["--train_dataset", "data"], directories=("here", "there")), "rank 1", "another dataset")


def test_another_batch_size_on_resuming(whole, dataset, tmp_path):
    output = tmp_path / "run"
    shutil.copytree(whole[0], output, symlinks=True)
    job = run_job(tmp_path, 2, TRAIN, *arguments(dataset, output, f"total_steps={STEPS}", *SAVES, "parallel.tensor=2",
                                                 "--resume", "batch_size=2"), check=False, timeout=DEADLINE)
    refused(job, "batch_size", "2", "4")


def test_resuming_without_a_checkpoint(dataset, tmp_path):
    job = run_job(tmp_path, 2, TRAIN, *arguments(dataset, tmp_path / "run", "--resume"), check=False, timeout=DEADLINE)
    refused(job, "--resume", "holds no checkpoint")


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


@pytest.mark.parametrize("flags, seconds", [
    (["--cluster_time_out=15"], 15), pytest.param([], 45, marks=pytest.mark.wide)])
def test_a_missing_process(flags, seconds, dataset, tmp_path):
    """Three are announced, two come: a time-out ends them, and one of them says so, within a minute if not told else."""
    job = run_job(tmp_path, 3, TRAIN, *arguments(dataset, tmp_path / "run", "total_steps=3"), check=False,
                  timeout=DEADLINE, flags=("--local_worker_num=2", *flags))
    refused(job, f"the 3 processes did not all find each other within {seconds} s", "--cluster_time_out")
    assert job.seconds < 60
    assert not (tmp_path / "run").exists()


@pytest.mark.wide
@pytest.mark.parametrize("rank", [0, 3])
def test_a_killed_process_ends_both_nodes(rank, dataset, tmp_path):
    """SIGKILL on the node of the scheduler, and on the other one; two msrun on this machine are the nodes."""
    port = free_port()
    command = [TRAIN, *arguments(dataset, tmp_path / "run", "total_steps=5000", "parallel.tensor=2")]
    nodes = [RunningJob(tmp_path, 4, *command, flags=("--local_worker_num=2", f"--node_rank={node}",
                                                      f"--master_port={port}")) for node in (0, 1)]
    try:
        while all(node.process.poll() is None for node in nodes) and "step    3/" not in nodes[0].log(0):
            time.sleep(0.1)
        nodes[rank // 2].worker(rank).kill()
        jobs = [node.finish(DEADLINE, check=False) for node in nodes]
    finally:
        for node in nodes:
            kill_tree(node.process.pid)
    assert all(job.exit_code != 0 for job in jobs)
    assert sum("error: the scheduler at" in log for log in jobs[1].logs) == (rank == 0)


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
