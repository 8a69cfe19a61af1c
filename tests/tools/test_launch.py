"""tools/launch.py under the real msrun: what is shown, who is named, how a job ends, what is refused."""

import os
import select
import signal
import socket
import subprocess
import sys
import textwrap
import time

import psutil
import pytest

from telechat.parallel.job_log import Log
from tests.conftest import ROOT, assert_refused

pytestmark = pytest.mark.wide

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


def test_rank_0_is_streamed_and_arguments_arrive_untouched(script, tmp_path):
    arguments = ["key=value", "--log_dir", "x", "-n", "5", "--", "学习率=1e-4", "two words", "", "--master=a:1"]
    job = script("""
        import os, sys, time
        print(os.environ["RANK_ID"], sys.argv[1:], sys.executable)
        sys.stdout.write("半")  # neither a whole line nor flushed
        while not os.path.exists("go_on"):
            time.sleep(0.05)
        print("done")
    """).start(*arguments)
    first = f"0 {arguments} {sys.executable}\n半".encode()
    assert job.read(len(first)) == first  # while the script still runs
    assert job.process.poll() is None
    (tmp_path / "go_on").touch()
    status, out, err = job.finish()
    assert (status, out) == (0, "done\n")
    assert job.log(0) == first.decode() + out
    assert job.log(1) == job.log(0).replace("0", "1", 1)
    assert str(tmp_path / "logs") in err
    assert sorted(path.name for path in (tmp_path / "logs").iterdir()) == [
        "msrun.log", "scheduler.log", "worker_0.log", "worker_1.log"]


def test_rank_0_reads_what_is_typed(script, tmp_path):
    """As in a chat: launch.py, msrun and the workers share one standard input."""
    (tmp_path / "typed").write_text("一\ntwo\n", encoding="utf-8")
    with open(tmp_path / "typed") as typed:
        job = script("""
            import os
            if (os.environ["MS_ROLE"], os.environ["RANK_ID"]) == ("MS_WORKER", "0"):
                print(input("> "), input("> "))
        """).start(stdin=typed)
    status, out, _ = job.finish()
    assert (status, out) == (0, "> > 一 two\n")


def test_bad_input_on_one_rank_keeps_its_status_and_its_sentence(script):
    job = script(SCHEDULER, """
        print("noise of rank", rank, flush=True)
        if rank == 1:
            print("error: run.yaml: no key batchsize; use batch_size", file=sys.stderr)
            sys.exit(2)
        time.sleep(300)
    """).start()
    status, out, err = job.finish()
    assert status == 2
    assert out == "noise of rank 0\n"
    assert [line for line in err.splitlines() if line.startswith("error: ")] == [
        "error: run.yaml: no key batchsize; use batch_size"]
    assert "rank 1 failed first" in err and "noise" not in err
    assert job.running() == []


def test_a_sentence_of_rank_0_is_shown_once(script):
    """It goes to stderr when it is written, and the report at the end does not repeat it."""
    job = script(SCHEDULER, """
        if rank == 0:
            print("working", flush=True)
            print("error: run.yaml: no key batchsize; use batch_size", file=sys.stderr)
            sys.exit(2)
        time.sleep(300)
    """).start()
    status, out, err = job.finish()
    assert status == 2
    assert out == "working\n"
    assert err.count("no key batchsize") == 1
    assert "rank 0 failed first" in err
    assert job.running() == []


def test_bad_input_on_all_ranks_is_a_ranks_even_if_the_scheduler_refuses_first(script):
    job = script("""
        import os, sys, time
        if os.environ["MS_ROLE"] != "MS_SCHED":
            time.sleep(3)
        print("error: parallel: 3 processes do not fit", file=sys.stderr)
        sys.exit(2)
    """).start()
    status, _, err = job.finish()
    assert status == 2
    assert "failed first" in err and "no worker before it" not in err
    assert err.count("error: parallel: 3 processes do not fit") == 1
    assert job.running() == []


def test_the_rank_whose_error_came_first_is_named_even_if_it_ends_last(script):
    # MindSpore's own end takes seconds after the traceback, while the others fail because of it.
    job = script(SCHEDULER, """
        if rank == 1:
            import atexit
            atexit.register(time.sleep, 30)
            print("\\n".join(f"line {i}" for i in range(100)))
            raise ValueError("the cause, 原因")
        while "Traceback" not in open(sys.argv[1]).read():
            time.sleep(0.05)
        time.sleep(0.5)
        raise RuntimeError("the consequence")
    """)
    status, out, err = job.start(job.folder / "logs/worker_1.log").finish()
    assert status == 1
    assert "rank 1 failed first" in err and "ValueError: the cause, 原因" in err
    assert "line 99" in err and "line 70\n" not in err  # the end of the log, not all of it
    assert "rank 0 failed" not in err and "consequence" not in err
    assert "RuntimeError: the consequence" in out


def test_a_killed_worker_ends_the_job_and_is_named(script):
    job = script(INIT, """
        print("reduced", reduce(1), flush=True)
        for step in range(600):
            time.sleep(0.5)
            reduce(step)
    """).start()
    job.wait_for("reduced 2.0")
    job.worker(1).kill()
    status, _, err = job.finish()
    assert status == 1
    assert "rank 1 failed first, killed by SIGKILL (by hand, or by the system when memory ran out)" in err
    assert job.running() == []
    assert list((job.folder / "logs").glob(".launch*")) == []


def test_interrupted_training_saves_and_ends(script):
    # From init() on MindSpore has SIGINT to itself and closes the workers' connections at it.
    job = script("""
        import signal
        stop = []
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda number, frame: stop.append(number))
    """, INIT, """
        print("training", flush=True)
        while not stop:
            time.sleep(0.1)
        time.sleep(1)  # for a second signal, if one came
        print(f"{reduce(len(stop)):g} signals, saved", flush=True)
    """).start()
    job.wait_for("training")
    job.process.send_signal(signal.SIGINT)
    status, out, err = job.finish()
    assert status == 0
    assert out.splitlines()[:2] == ["training", "2 signals, saved"]
    assert "2 signals, saved" in job.log(1)
    assert "failed" not in err
    assert job.running() == []


def test_a_second_interrupt_kills_what_does_not_end(script):
    job = script(SCHEDULER, """
        signal.signal(signal.SIGTERM, lambda *_: print("not yet", flush=True))
        print("ready", flush=True)
        for _ in range(600):
            time.sleep(0.5)
    """).start()
    job.wait_for("ready")
    job.process.send_signal(signal.SIGINT)
    job.wait_for("not yet")
    job.process.send_signal(signal.SIGINT)
    status, _, err = job.finish()
    assert status == 130
    assert "interrupted" in err and "failed" not in err
    assert job.running() == []


def test_the_workers_do_not_outlive_a_killed_launcher(script):
    job = script(SCHEDULER, """
        print("ready", flush=True)
        time.sleep(300)
    """).start()
    job.wait_for("ready")
    time.sleep(1)  # msrun waits for its workers from now on
    assert len(job.running()) == 5  # launch.py, msrun, scheduler and two workers
    job.process.kill()
    end = time.monotonic() + DEADLINE
    while job.running():
        assert time.monotonic() < end, job.running()
        time.sleep(0.2)


def test_two_nodes_on_one_machine(script, tmp_path):
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    common = ("-n", 4, "--nodes", 2, "--master", f"127.0.0.1:{port}", "--node_rank")
    source = 'import os; print(*(os.environ[name] for name in ("MS_ROLE", "RANK_ID", "MS_SCHED_PORT", "RANK_SIZE")))'
    jobs = [script(source).start(flags=(*common, node), logs=f"node_{node}") for node in (0, 1)]
    results = [job.finish() for job in jobs]
    assert [status for status, _, _ in results] == [0, 0], results
    assert results[0][1] == f"MS_WORKER 0 {port} 4\n"
    assert results[1][1] == ""  # rank 0 is on the other node
    for node, rank in ((0, 0), (0, 1), (1, 2), (1, 3)):
        assert jobs[node].log(rank, f"node_{node}") == f"MS_WORKER {rank} {port} 4\n"
    # msrun starts a scheduler on both: the second one must do nothing, or it may take the first one's port.
    assert (tmp_path / "node_0/scheduler.log").read_text() == f"MS_SCHED 0 {port} 4\n"
    assert (tmp_path / "node_1/scheduler.log").read_text() == ""


def test_one_process_is_the_script_itself(tmp_path):
    path = tmp_path / "script.py"
    path.write_text("import os, sys; print(input(), sys.argv[1:], os.getpid(), 'MS_ROLE' in os.environ); sys.exit(7)")
    process = subprocess.Popen([sys.executable, LAUNCH, "-n", "1", path, "-n", "x=1"], cwd=tmp_path, text=True,
                               stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    out, _ = process.communicate("typed\n", timeout=DEADLINE)
    assert process.returncode == 7
    assert out == f"typed ['-n', 'x=1'] {process.pid} False\n"
    assert [entry.name for entry in tmp_path.iterdir()] == ["script.py"]


@pytest.mark.parametrize("flags, words", [
    (["-n", 3, "--nodes", 2, "--master", "127.0.0.1:8118"], ["-n 3", "--nodes 2"]),
    (["-n", 0], ["-n", "at least 1"]),
    (["-n", 4, "--nodes", 2], ["--nodes 2", "--master"]),
    (["-n", 4, "--nodes", 2, "--node_rank", 2, "--master", "127.0.0.1:8118"], ["--node_rank 2", "0 to 1"]),
    (["-n", 4, "--master", "127.0.0.1"], ["--master 127.0.0.1", "HOST:PORT"]),
    (["-n", 4, "--master", "127.0.0.1:80"], ["127.0.0.1:80", "1024 to 65535"]),
    (["-n", 4, "--nodes", 2, "--master", "192.0.2.1:8118"], ["192.0.2.1:8118", "not an address of this machine"]),
    (["-n", 4, "--cluster_time_out", 0], ["--cluster_time_out", "at least 1"]),
    (["-n", 4, "--log_dir", "script.py"], ["--log_dir script.py", "directory"]),
    (["-n", "four"], ["-n", "four"]),
])
def test_refuses(flags, words, tool, tmp_path):
    (tmp_path / "work").mkdir()
    (tmp_path / "work/script.py").touch()
    assert_refused(tool("launch.py", *flags, "script.py"), *words)
    assert [entry.name for entry in (tmp_path / "work").iterdir()] == ["script.py"]


def test_refuses_a_missing_script_and_a_port_in_use(tool, tmp_path):
    assert_refused(tool("launch.py", "-n", 2, "python", "tools/train.py"), "python is not a file")
    (tmp_path / "work/script.py").touch()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        assert_refused(tool("launch.py", "-n", 2, "--master", f"127.0.0.1:{port}", "script.py"), port, "in use")


def test_a_log_is_read_on_where_it_was_left(tmp_path, capsys):
    shown = open(tmp_path / "shown", "w+b")
    log = Log(tmp_path / "log", shown)
    log.read_on(now=0)  # no such file yet
    with open(tmp_path / "log", "ab", buffering=0) as file:
        for now, data in ((1, "半".encode()[:2]), (2, "半".encode()[2:] + b"\nno error: here\nTrace"), (3, b""),
                          (4, b"back (most recent call last):\n"), (5, b"more\nerr"), (6, b"or: a sentence\n[INFO] kept\n[INF"),
                          (7, b"O] DEVICE(12,7f) chatter\n[WARNING] DEVICE(1\ner")):
            file.write(data)
            log.read_on(now)
    # A sentence goes to stderr, whole; what only looks like the beginning of one is shown at the end.
    expected = (tmp_path / "log").read_bytes()
    for line in (b"error: a sentence\n", b"[INFO] DEVICE(12,7f) chatter\n", b"[WARNING] DEVICE(1\n"):
        expected = expected.replace(line, b"")
    assert (tmp_path / "shown").read_bytes() + b"er" == expected
    log.finish()
    assert (tmp_path / "shown").read_bytes() == expected
    assert capsys.readouterr().err == "error: a sentence\n" and log.said == ["error: a sentence"]
    assert log.error_times == [4, 6]
    shown.close()
