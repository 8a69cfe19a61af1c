"""Scripts that tools/launch.py runs under the real msrun."""

import os
import select
import subprocess
import sys
import textwrap
import time

import psutil
import pytest

from tests.conftest import ROOT

LAUNCH = ROOT / "tools/launch.py"
DEADLINE = 60  # seconds: "a dead worker ends the job within a minute"
# msrun runs the script in one process more, its scheduler, which stays in init() until the others have ended.
SCHEDULER = """
    import os, signal, sys, time
    rank = int(os.environ["RANK_ID"])
    if os.environ["MS_ROLE"] == "MS_SCHED":
        time.sleep(300)
"""
INIT = """
    import os, signal, sys, time
    import mindspore as ms
    import mindspore.mint.distributed as dist
    from mindspore.communication import create_group, get_rank, init
    ms.set_device("CPU")
    init()
    create_group("pair", [0, 1])
    def reduce(number):
        tensor = ms.Tensor([float(number)])
        dist.all_reduce(tensor, group="pair")
        return tensor.asnumpy()[0]
"""


class LaunchedScript:
    """A script in a directory of its own, and launch.py running it."""

    def __init__(self, folder, *parts):
        self.folder = folder
        self.path = folder / "script.py"
        self.path.write_text("\n".join(map(textwrap.dedent, parts)), encoding="utf-8")
        self.process = None

    def start(self, *arguments, flags=("-n", 2), logs="logs", stdin=subprocess.DEVNULL):
        environment = {name: value for name, value in os.environ.items()
                       if name not in ("GLOG_v", "MS_NODE_TIMEOUT", "PYTHONUNBUFFERED")}
        self.process = subprocess.Popen(
            [sys.executable, LAUNCH, *map(str, flags), "--log_dir", self.folder / logs, self.path,
             *map(str, arguments)], cwd=self.folder, stdin=stdin, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, env=environment)
        return self

    def finish(self):
        """(exit status, stdout, stderr); fails the test where the job does not end in time."""
        out, err = self.process.communicate(timeout=DEADLINE)
        return self.process.returncode, out.decode(), err.decode()

    def read(self, count):
        """The next ``count`` bytes of stdout, or less where they do not come in time."""
        data, end = b"", time.monotonic() + DEADLINE
        while len(data) < count and select.select([self.process.stdout], [], [], max(end - time.monotonic(), 0))[0]:
            more = os.read(self.process.stdout.fileno(), count - len(data))
            if not more:
                break
            data += more
        return data

    def log(self, rank, logs="logs"):
        path = self.folder / logs / f"worker_{rank}.log"
        return path.read_text(encoding="utf-8") if path.exists() else ""

    def wait_for(self, text, ranks=(0, 1)):
        end = time.monotonic() + DEADLINE
        while not all(text in self.log(rank) for rank in ranks):
            assert time.monotonic() < end and self.process.poll() is None, [self.log(rank) for rank in ranks]
            time.sleep(0.1)

    def running(self):
        """All processes that have this script on their command line."""
        found = []
        for process in psutil.process_iter():
            try:
                if str(self.path) in process.cmdline() and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
            except psutil.Error:
                pass
        return found

    def worker(self, rank):
        return next(process for process in self.running()
                    if process.environ().get("MS_ROLE") == "MS_WORKER" and process.environ()["RANK_ID"] == str(rank))


@pytest.fixture
def script(tmp_path):
    """script(*parts of a Python file) → `LaunchedScript`; none of its processes outlives the test."""
    made = []

    def make(*parts):
        made.append(LaunchedScript(tmp_path, *parts))
        return made[-1]
    yield make
    for one in made:
        for process in one.running():
            process.kill()
        if one.process is not None:
            one.process.communicate()
