"""How a job of tools/launch.py ends under the real msrun: who is named, what signals do, that nothing is left running."""

import pathlib
import re
import signal
import time

import pytest

from tests.conftest import ROOT
from tests.tools.conftest import DEADLINE, INIT, SCHEDULER

pytestmark = pytest.mark.wide


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


@pytest.mark.parametrize("work, status", [("0", 0), ("1", 1)])
def test_a_crash_after_all_work_is_done_is_no_failure(script, work, status):
    """MindSpore's leave of the job can end with a segmentation fault; where the work had failed it is one."""
    job = script(SCHEDULER, f"""
        import atexit
        sys.path.insert(0, {str(ROOT)!r})
        from telechat import cli
        if rank == 1:
            atexit.register(os.kill, os.getpid(), signal.SIGSEGV)
        cli.run(lambda: {work} if rank == 1 else 0)
    """).start()
    ended, _, err = job.finish()
    assert ended == status
    assert ("all had finished their work" in err) == (status == 0)
    assert ("rank 1 failed first" in err) == (status != 0)
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


@pytest.mark.parametrize("rank", [0, 1])
def test_an_unexpected_failure_of_a_rank_is_one_line_that_names_a_file(script, rank):
    """Rank 0's log is shown as it grows: its traceback must not be in it either."""
    job = script(INIT, f"""
        sys.path.insert(0, {str(ROOT)!r})
        from telechat.cli import run
        def main():
            reduce(1)
            if get_rank() == {rank}:
                raise RuntimeError("the first line\\nand more")
            reduce(2)
        run(main)
    """).start()
    status, out, err = job.finish()
    assert status == 1
    sentence, = [line for line in err.splitlines() if "the first line" in line]
    file = pathlib.Path(re.fullmatch(r"error: unexpected RuntimeError: the first line \(details: (.*)\)", sentence)[1])
    assert file.parent == job.folder / "logs"
    assert f"rank {rank} failed first; its log is {job.folder}/logs/worker_{rank}.log" in err
    saved = file.read_text()
    assert saved.startswith(f"{job.path}\n") and 'raise RuntimeError("the first line' in saved and "\nand more" in saved
    assert "Traceback" not in out + err + job.log(rank)
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
        reduce(1)  # the other one is past init() too
        print("training", flush=True)
        while not stop:
            time.sleep(0.1)
        time.sleep(1)  # for a second signal, if one came
        print(f"{reduce(len(stop)):g} signals, saved", flush=True)
    """).start()
    job.wait_for("training")
    others = [process for process in job.running()
              if process.pid != job.process.pid and process.environ().get("MS_ROLE") != "MS_WORKER"]
    assert len(others) == 2  # msrun and the scheduler, which must outlive what Slurm sends to every process
    for process in others:
        process.send_signal(signal.SIGUSR1)
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
