"""The fixture that runs a script in several processes under MindSpore's own msrun."""

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


@pytest.fixture
def msrun(tmp_path):
    """msrun(worker_count, script, *arguments, timeout=120, check=True, environment={}) → `Job`.

    Runs ``script`` (a name in tests/distributed/scripts, or any path) in ``tmp_path`` in
    ``worker_count`` processes and waits for their end. A job that fails fails the test, with the end
    of the log that matters, unless ``check`` is False; one that is not done after ``timeout`` seconds
    is killed and always fails the test. ``environment`` adds variables.
    """
    jobs = []

    def call(worker_count, script, *arguments, timeout=120, check=True, environment=None):
        log_directory = tmp_path / f"log_{len(jobs)}"
        jobs.append(log_directory)
        path = pathlib.Path(script)
        if not path.is_absolute():
            path = SCRIPTS / path
        binaries = pathlib.Path(sys.executable).parent
        variables = dict(os.environ)
        # Left-overs of an outer job would make the workers believe that they belong to it.
        for name in ("RANK_ID", "RANK_SIZE", "MS_ROLE", "MS_NODE_ID", "DEVICE_ID"):
            variables.pop(name, None)
        variables.update({
            "PATH": f"{binaries}{os.pathsep}{variables.get('PATH', '')}",  # msrun starts `python` from PATH
            "PYTHONPATH": f"{ROOT}{os.pathsep}{variables.get('PYTHONPATH', '')}".rstrip(os.pathsep),
            "MS_NODE_TIMEOUT": "5",  # a dead worker ends the job in 20 s instead of 50
            "GLOG_v": "3",  # MindSpore's own logs: errors only
            **(environment or {})})
        command = [
            sys.executable, "-m", "mindspore.parallel.cluster.run", f"--worker_num={worker_count}",
            f"--local_worker_num={worker_count}", f"--master_port={free_port()}", f"--log_dir={log_directory}",
            "--join=True", f"--tail_worker_log={worker_count}",  # a rank that is not there: show none
            str(path), *map(str, arguments)]
        with open(tmp_path / "msrun.log", "w") as console:
            process = subprocess.Popen(command, cwd=tmp_path, env=variables, stdin=subprocess.DEVNULL,
                                       stdout=console, stderr=subprocess.STDOUT)
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
        if exit_code is None:
            pytest.fail(describe_failure(log_directory, worker_count, f"not done after {timeout} s"), pytrace=False)
        failure = ""
        if exit_code != 0:
            failure = describe_failure(log_directory, worker_count, f"msrun ended with status {exit_code}")
        if failure and check:
            pytest.fail(failure, pytrace=False)
        return Job(exit_code, logs, failure)

    return call
