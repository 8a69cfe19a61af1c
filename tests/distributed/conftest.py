"""Fixtures that run a script in several processes under MindSpore's own msrun."""

import functools

import pytest

from tests.conftest import preprocess_samples
from tests.distributed.job import RunningJob, kill_tree, run_job


@pytest.fixture
def msrun(tmp_path):
    """msrun(worker_count, script, *arguments, timeout=120, check=True, environment=None) → `Job`.

    `run_job` in the test's ``tmp_path``.
    """
    return functools.partial(run_job, tmp_path)


@pytest.fixture
def started(tmp_path):
    """started(worker_count, script, *arguments, …) → `RunningJob` in the test's ``tmp_path``, killed at the end."""
    jobs = []

    def start(*arguments, **more):
        jobs.append(RunningJob(tmp_path, *arguments, **more))
        return jobs[-1]
    yield start
    for job in jobs:
        kill_tree(job.process.pid)
        job.process.wait()


@pytest.fixture(scope="session")
def msrun_in():
    """`run_job` itself, for a fixture that runs one job for many tests."""
    return run_job


@pytest.fixture(scope="session")
def dataset(tmp_path_factory):
    """The shipped samples, preprocessed."""
    return preprocess_samples(tmp_path_factory.mktemp("data") / "dataset")
