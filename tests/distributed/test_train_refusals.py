"""tools/train.py under msrun where processes do not agree, do not come or are gone: one sentence, within a minute.

On one of two processes something differs: scripts/one_rank.py.
"""

import json
import shutil
import time

import pytest

from tests.conftest import ROOT, preprocess_samples
from tests.distributed.job import RunningJob, free_port, kill_tree, run_job
from tests.distributed.train_job import DEADLINE, TRAIN, arguments, refused


@pytest.fixture
def one_rank(dataset, tmp_path):
    """one_rank(common arguments, rank 1's other arguments, its other project folder, directories of both) → `Job`.

    Also: seconds by which each starts late and after which rank 0 is stopped, processes announced, flags of msrun.
    """
    def call(common, other=(), project=ROOT, directories=(".", "."), late=(0, 0), stop=None,
             processes=2, flags=()):
        (tmp_path / "other.json").write_text(json.dumps({
            "arguments": list(map(str, other)), "project": str(project), "directories": directories,
            "late": late, "stop": stop}))
        return run_job(tmp_path, processes, "one_rank.py", tmp_path / "other.json",
                       *arguments(dataset, tmp_path / "run", "total_steps=3", *common), check=False, timeout=DEADLINE,
                       flags=flags)
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


def test_resuming_without_a_checkpoint(dataset, tmp_path):
    job = run_job(tmp_path, 2, TRAIN, *arguments(dataset, tmp_path / "run", "--resume"), check=False, timeout=DEADLINE)
    refused(job, "--resume", "holds no checkpoint")


NOT_ALL = "the 3 processes did not all find each other within {} s"


@pytest.mark.parametrize("late", [(5, 0), pytest.param((0, 5), marks=pytest.mark.wide)])
def test_a_missing_process(late, one_rank, tmp_path):
    """Three are announced, two come, not at once: a time-out ends them, and the first of them says so."""
    job = one_rank([], late=late, processes=3, flags=("--local_worker_num=2", "--node_rank=0", "--cluster_time_out=10"))
    refused(job, NOT_ALL.format(10), "--cluster_time_out")
    assert not (tmp_path / "run").exists()


@pytest.mark.wide
def test_a_process_that_no_longer_answers(one_rank, tmp_path):
    """One of the two that wait for a third is stopped: the other one hears of it."""
    job = one_rank([], stop=10, processes=3, flags=("--local_worker_num=2", "--node_rank=0", "--cluster_time_out=60"))
    refused(job, "a process ended before all had found each other")
    assert not (tmp_path / "run").exists()


@pytest.mark.wide
def test_a_missing_process_without_a_time_out(one_rank):
    """If not told else, within a minute."""
    job = one_rank([], processes=3, flags=("--local_worker_num=2",))
    refused(job, NOT_ALL.format(45), "--cluster_time_out")


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
