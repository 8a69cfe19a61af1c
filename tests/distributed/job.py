"""Run a script in several processes under MindSpore's own msrun."""

import itertools
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import time
import typing

import psutil
import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
SCRIPTS = pathlib.Path(__file__).resolve().parent / "scripts"
SHOWN_LINES = 40
CLOSED = "Event base dispatch success!"  # MindSpore's word when it has closed the connections, a script being over
FAILURE_WORDS = ("Traceback", "Error", "error: ", "can't open file")


class Job(typing.NamedTuple):
    """How a job under msrun ended."""

    exit_code: int
    logs: list  # text of each worker's log, by rank
    seconds: float  # from its start to its end


class RunningJob:
    """A job under msrun that has been started.

    Args:
        directory (pathlib.Path): where it runs; must exist. Results and logs end up here.
        worker_count (int): processes.
        script: a name in tests/distributed/scripts, or an absolute path.
        arguments: the script's; turned into strings.
        environment (dict): variables to add.
        flags: more of msrun's own.
        text (str): what the workers can read from standard input.
    """

    def __init__(self, directory, worker_count, script, *arguments, environment=None, flags=(), text=None):
        path = pathlib.Path(script)
        if not path.is_absolute():
            path = SCRIPTS / path
        self.worker_count = worker_count
        self.log_directory = next(folder for folder in (directory / f"log_{i}" for i in itertools.count())
                                  if not folder.exists())
        self.log_directory.mkdir()
        command = [
            sys.executable, "-m", "mindspore.parallel.cluster.run", f"--worker_num={worker_count}",
            f"--local_worker_num={worker_count}", f"--master_port={free_port()}", f"--log_dir={self.log_directory}",
            "--join=True", f"--tail_worker_log={worker_count}",  # a rank that is not there: show none
            *map(str, flags), str(path), *map(str, arguments)]
        self._started = time.monotonic()
        self._console = directory / "msrun.log"
        with open(self._console, "w") as console:
            self.process = subprocess.Popen(
                command, cwd=directory, env=job_environment(environment or {}), text=True,
                stdin=subprocess.DEVNULL if text is None else subprocess.PIPE,
                stdout=console, stderr=subprocess.STDOUT)
        if text is not None:
            self.process.stdin.write(text)
            self.process.stdin.close()

    def worker(self, rank):
        """The worker of that rank, a `psutil.Process`; None where it does not run (yet, or any more)."""
        try:
            processes = psutil.Process(self.process.pid).children(recursive=True)
        except psutil.Error:
            return None
        for process in processes:
            try:
                variables = process.environ()
            except psutil.Error:  # it has ended since, as the commands do that MindSpore starts now and then
                continue
            if variables.get("MS_ROLE") == "MS_WORKER" and variables.get("RANK_ID") == str(rank):
                return process
        return None

    def log(self, rank):
        """What that rank has written so far."""
        path = self.log_directory / f"worker_{rank}.log"
        return path.read_text(errors="replace") if path.exists() else ""

    def finish(self, timeout=120, check=True):
        """Wait for the end and return a `Job`; after ``timeout`` seconds all is killed and the test fails.

        check (bool): whether a job that fails fails the test, with the end of the log that matters.
        """
        try:
            exit_code = self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            exit_code = None
        finally:
            seconds = time.monotonic() - self._started
            kill_tree(self.process.pid)
            self.process.wait()
        if exit_code and self._crashed_while_leaving():
            exit_code = 0
        failure = ""
        if exit_code != 0:
            how = f"not done after {timeout} s" if exit_code is None else f"msrun ended with status {exit_code}"
            failure = self._describe_failure(how)
        if failure and (check or exit_code is None):
            pytest.fail(failure, pytrace=False)
        return Job(exit_code, [self.log(rank) for rank in range(self.worker_count)], seconds)

    def _crashed_while_leaving(self):
        """Whether the only failure is MindSpore's own when processes end (`telechat.cli.FINISHED` says which)."""
        failures = re.findall(r"exit with exception\. Error code: (-?\d+)", self._console.read_text(errors="replace"))
        logs = filter(None, map(self.log, range(self.worker_count)))
        return failures == [str(-signal.SIGSEGV)] and all(CLOSED in log for log in logs)

    def _describe_failure(self, headline):
        """The headline and the end of the log of the rank whose error was written first."""
        failed = []
        for rank in range(self.worker_count):
            if any(word in self.log(rank) for word in FAILURE_WORDS):
                failed.append(((self.log_directory / f"worker_{rank}.log").stat().st_mtime, rank))
        # The others wait in a collective until msrun kills them, which leaves nothing in their logs.
        rank = min(failed)[1] if failed else 0
        lines = self.log(rank).splitlines()[-SHOWN_LINES:] or ["(no log)"]
        parts = [f"{headline}; the end of rank {rank}'s log:", *lines]
        if not failed:  # a process that a signal ended says nothing; msrun knows its status
            parts += ["msrun's last words:", *self._console.read_text(errors="replace").splitlines()[-SHOWN_LINES:]]
        return "\n".join(parts)


def run_job(directory, worker_count, script, *arguments, timeout=120, check=True, **more):
    """Start a `RunningJob`, wait for its end, return a `Job`; arguments as theirs."""
    return RunningJob(directory, worker_count, script, *arguments, **more).finish(timeout, check)


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
