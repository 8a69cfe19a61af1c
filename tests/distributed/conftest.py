"""The fixture that runs a script in several processes under MindSpore's own msrun."""

import functools
import itertools
import os
import pathlib
import socket
import subprocess
import sys
import typing

import psutil
import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
SCRIPTS = pathlib.Path(__file__).resolve().parent / "scripts"
SHOWN_LINES = 40
FAILURE_WORDS = ("Traceback", "Error", "error: ", "can't open file")


class Job(typing.NamedTuple):
    """How a job under msrun ended."""

    exit_code: int
    logs: list  # text of each worker's log, by rank
    first_failure: str  # which rank failed first and the last lines of its log; "" after a success


def free_port():
    """A TCP port that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def kill_tree(pid):
    """Kill a process and all that descend from it (msrun's workers have sessions of their own)."""
    try:
        parent = psutil.Process(pid)
        family = [*parent.children(recursive=True), parent]
    except psutil.NoSuchProcess:
        return
    for process in family:
        try:
            process.kill()
        except psutil.NoSuchProcess:
            pass


def describe_failure(log_directory, worker_count, headline):
    """The headline and the end of the log of the rank whose error was written first."""
    failed = []
    for rank in range(worker_count):
        log = log_directory / f"worker_{rank}.log"
        if log.exists() and any(word in log.read_text(errors="replace") for word in FAILURE_WORDS):
            failed.append((log.stat().st_mtime, rank))
    # The others wait in a collective until msrun kills them, which leaves nothing in their logs.
    rank = min(failed)[1] if failed else 0
    log = log_directory / f"worker_{rank}.log"
    lines = log.read_text(errors="replace").splitlines()[-SHOWN_LINES:] if log.exists() else ["(no log)"]
    return "\n".join([f"{headline}; the end of rank {rank}'s log:", *lines])


def run_job(directory, worker_count, script, *arguments, timeout=120, check=True, environment=None):
    """Run ``script`` in ``worker_count`` processes under msrun, wait for their end, return a `Job`.

    Args:
        directory (pathlib.Path): where it runs; must exist. Results and logs end up here.
        script: a name in tests/distributed/scripts, or an absolute path.
        arguments: the script's; turned into strings.
        timeout (float): seconds after which all is killed and the test fails.
        check (bool): whether a job that fails fails the test, with the end of the log that matters.
        environment (dict): variables to add.
    """
    path = pathlib.Path(script)
    if not path.is_absolute():
        path = SCRIPTS / path
    log_directory = next(folder for folder in (directory / f"log_{i}" for i in itertools.count())
                         if not folder.exists())
    command = [
        sys.executable, "-m", "mindspore.parallel.cluster.run", f"--worker_num={worker_count}",
        f"--local_worker_num={worker_count}", f"--master_port={free_port()}", f"--log_dir={log_directory}",
        "--join=True", f"--tail_worker_log={worker_count}",  # a rank that is not there: show none
        str(path), *map(str, arguments)]
    with open(directory / "msrun.log", "w") as console:
        process = subprocess.Popen(command, cwd=directory, env=job_environment(environment or {}),
                                   stdin=subprocess.DEVNULL, stdout=console, stderr=subprocess.STDOUT)
        try:
            exit_code = process.wait(timeout)
        except subprocess.TimeoutExpired:
            exit_code = None
        finally:
            kill_tree(process.pid)
            process.wait()
    logs = []
    for rank in range(worker_count):
        log = log_directory / f"worker_{rank}.log"
        logs.append(log.read_text(errors="replace") if log.exists() else "")
    failure = ""
    if exit_code != 0:
        how = f"not done after {timeout} s" if exit_code is None else f"msrun ended with status {exit_code}"
        failure = describe_failure(log_directory, worker_count, how)
    if failure and (check or exit_code is None):
        pytest.fail(failure, pytrace=False)
    return Job(exit_code, logs, failure)


def job_environment(additions):
    """This process's environment, made fit for a job of its own."""
    variables = dict(os.environ)
    # Left-overs of an outer job would make the workers believe that they belong to it.
    for name in ("RANK_ID", "RANK_SIZE", "MS_ROLE", "MS_NODE_ID", "MS_WORKER_NUM", "DEVICE_ID"):
        variables.pop(name, None)
    return {
        **variables,
        # msrun starts `python` from PATH.
        "PATH": f"{pathlib.Path(sys.executable).parent}{os.pathsep}{variables.get('PATH', '')}",
        "PYTHONPATH": f"{ROOT}{os.pathsep}{variables.get('PYTHONPATH', '')}".rstrip(os.pathsep),
        "MS_NODE_TIMEOUT": "5",  # a dead worker ends the job in 20 s instead of 50
        "GLOG_v": "3",  # MindSpore's own logs: errors only
        **additions}


@pytest.fixture
def msrun(tmp_path):
    """msrun(worker_count, script, *arguments, timeout=120, check=True, environment=None) → `Job`.

    `run_job` in the test's ``tmp_path``.
    """
    return functools.partial(run_job, tmp_path)


@pytest.fixture(scope="session")
def msrun_in():
    """`run_job` itself, for a fixture that runs one job for many tests."""
    return run_job
