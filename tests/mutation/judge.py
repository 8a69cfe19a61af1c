"""Runs tests in forked processes that have imported what takes long, MindSpore and torch, and nothing of the project."""

import contextlib
import json
import os
import pathlib
import resource
import signal
import sys
import time

import pytest

MEMORY = 8 << 30  # bytes a process may take; a fault may fill lists without end
LOAD = 10  # how many times longer than recorded tests may take before the fault is said to hang them
PATIENCE = 120  # seconds besides


def preload():
    """Import what the tests import, but for the project."""
    for name in ("mindspore", "torch", "scipy.stats", "hypothesis", "sentencepiece", "tokenizers", "safetensors.numpy",
                 "matplotlib", "tqdm", "yaml", "psutil", "starlette.applications", "uvicorn", "transformers", "openai"):
        with contextlib.suppress(ImportError):
            __import__(name)


class Chosen:
    """A pytest plugin: runs the tests of given ids alone, in their order, and remembers what failed first."""

    def __init__(self, tests):
        self.order = {test: number for number, test in enumerate(tests)}
        self.failed = None

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items):
        items[:] = sorted((item for item in items if item.nodeid in self.order), key=lambda item: self.order[item.nodeid])

    def pytest_runtest_logreport(self, report):
        if report.failed:
            self.fail(report)

    def pytest_collectreport(self, report):
        if report.failed:
            self.fail(report)

    def fail(self, report):
        if self.failed is None:
            crash = getattr(report.longrepr, "reprcrash", None)
            self.failed = [report.nodeid, (crash.message if crash else str(report.longrepr))[-300:]]


class Running:
    """One forked process that runs tests in a copy of the project. Poll `finished`."""

    def __init__(self, copied, tests, seconds, first=True):
        """``seconds``: what the tests take by themselves. first: stop at the first failure."""
        self.result = pathlib.Path(copied).parent / f"result-{os.getpid()}.json"
        self.result.unlink(missing_ok=True)
        self.ends = time.monotonic() + LOAD * seconds + PATIENCE
        sys.stdout.flush()
        self.process = os.fork()
        if self.process == 0:
            status = 70
            try:
                status = self._run(copied, tests, first)
            finally:
                os._exit(status)

    def _run(self, copied, tests, first):
        os.setpgid(0, 0)
        resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
        nowhere = os.open(os.devnull, os.O_RDWR)
        for descriptor in range(3):
            os.dup2(nowhere, descriptor)
        os.chdir(copied)
        os.environ["PYTHONPATH"] = str(copied)
        sys.path.insert(0, str(copied))
        for name in [name for name in sys.modules if name.partition(".")[0] == "tests"]:
            del sys.modules[name]
        chosen = Chosen(tests)
        files = list(dict.fromkeys(test.partition("::")[0] for test in tests))
        scratch = pathlib.Path(copied).parent / "tmp"
        status = pytest.main(["-q", *["-x"] * first, "-p", "no:cacheprovider", f"--basetemp={scratch}", *files],
                             plugins=[chosen])
        self.result.write_text(json.dumps(chosen.failed), encoding="utf-8")
        return int(status)

    def finished(self):
        """None while it runs; then (whether the tests passed, what failed first: [test, message] or None)."""
        process, status = os.waitpid(self.process, os.WNOHANG)
        if not process:
            if time.monotonic() < self.ends:
                return None
            self.end()
            os.waitpid(self.process, 0)
            return False, ["time limit", ""]
        self.end()  # a server that a failing test has left behind
        code = os.waitstatus_to_exitcode(status)
        if code in (0, 1, 2):  # 2: a module that can no longer be imported
            return code == 0, json.loads(self.result.read_text(encoding="utf-8"))
        if code < 0 or code == 70:
            return False, ["crash", f"status {code}"]
        raise RuntimeError(f"pytest ended with status {code}")

    def end(self):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process, signal.SIGKILL)
