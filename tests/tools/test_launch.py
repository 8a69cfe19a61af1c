"""tools/launch.py under the real msrun: what is shown, what the script is given, what is refused."""

import socket
import subprocess
import sys

import pytest

from telechat.parallel.job_log import Log
from tests.conftest import assert_refused
from tests.tools.conftest import DEADLINE, LAUNCH

pytestmark = pytest.mark.wide


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
