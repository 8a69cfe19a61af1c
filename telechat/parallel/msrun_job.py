"""A job under MindSpore's msrun: rank 0's log on the terminal, who failed first, a clean end."""

import contextlib
import os
import re
import signal
import sys
import time

from telechat.cli import UNEXPECTED
from telechat.parallel.job_log import ERROR_AGE, Log, say, show_end
from telechat.parallel.rendezvous import NOT_MET

INTERVAL = 0.1  # seconds between two looks
LOST_SCHEDULER = 30  # seconds that the workers get to notice that their scheduler has failed

MSRUN_NAMES = re.compile(rb"Worker process (\d+) exit with exception\. Error code: (-?\d+)")
LOST_RANK = re.compile(r"worker (\d+) is the first one timed out")
BROKEN_OFF = {-signal.SIGINT, -signal.SIGTERM, 128 + signal.SIGINT, 128 + signal.SIGTERM}


class Process:
    """A child of msrun as others can see it. ``code`` is None while it runs or where nobody saw its end."""

    def __init__(self):
        self.pid = self.code = self.end_time = None
        self.told_to_end = False

    def look(self, record, now):
        """Find the process number in the file ``record``, later the end in /proc; True where it ended now.

        There an ended process keeps its exit status until msrun, which looks once a second, collects it.
        """
        if self.end_time is not None:
            return False
        try:
            if self.pid is None:
                with open(record, encoding="ascii") as file:
                    self.pid = int(file.read())
            with open(f"/proc/{self.pid}/stat", encoding="utf-8", errors="replace") as file:
                fields = file.read().rpartition(")")[2].split()
        except ValueError:
            return False  # the number is just being written
        except (FileNotFoundError, ProcessLookupError):
            self.end_time = now if self.pid else None
            return self.pid is not None
        if fields[0] in "ZX":
            self.end_time, self.code = now, os.waitstatus_to_exitcode(int(fields[-1]))
        return self.end_time is not None

    @property
    def runs(self):
        """Whether it was seen to begin and not to end."""
        return self.pid is not None and self.end_time is None

    def failed(self):
        """Whether it ended with another status than 0; False where none is known."""
        return self.code not in (0, None)


class MsrunJob:
    """Watches over the processes that one msrun starts.

    A SIGINT, SIGTERM, SIGHUP or SIGUSR1 (Slurm's warning) reaches the workers as SIGTERM, at which training saves and ends. Not as
    SIGINT: from init() on MindSpore has that signal to itself and closes the connections between the
    workers at it; from its first operator on it turns it into SIGTERM. A second SIGINT kills them.

    Args:
        ranks (range): global ranks on this machine.
        nodes (int): machines in the job.
        log_dir (str): where msrun writes worker_<rank>.log and scheduler.log.
        folder (str): holds the ``python`` that msrun starts, the process numbers that it notes, and the files
            by which processes say that they have finished (`telechat.cli.FINISHED`); as a part of PATH it is also the mark by which all that belongs to the job is recognised.
    """

    def __init__(self, ranks, nodes, log_dir, folder):
        self.ranks, self.nodes, self.log_dir, self.folder = ranks, nodes, log_dir, folder
        node = f"_{ranks[0] // len(ranks)}" if nodes > 1 else ""  # nodes may share the directory
        self.msrun_log = os.path.join(log_dir, f"msrun{node}.log")
        self.logs = {rank: Log(os.path.join(log_dir, f"worker_{rank}.log"),
                               sys.stdout.buffer if rank == 0 else None) for rank in ranks}
        self.workers = {rank: Process() for rank in ranks}
        self.scheduler = Process()
        self.received = []  # signals, in order
        self._named = None  # number of the process that msrun says has failed
        self._failed_at = None

    @contextlib.contextmanager
    def signals(self):
        """Note the signals that end a run instead of ending; what is ignored stays so (nohup)."""
        numbers = [number for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
                   if signal.getsignal(number) != signal.SIG_IGN]
        previous = {number: signal.signal(number, lambda number, _: self.received.append(number))
                    for number in numbers}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def wait(self, msrun):
        """Show rank 0, hand on signals, and return the exit status once ``msrun`` has ended.

        Whatever happens, nothing of the job is left running.
        """
        announced = False
        try:
            while True:
                ended = msrun.poll() is not None  # asked first, so that nothing written before is missed
                self._look()
                if ended:
                    break
                if self.received and not announced:
                    announced = True
                    say("waiting for the workers to end; Ctrl-C again kills them")
                self._hand_on_signals()
                self._end_what_waits_in_vain()
                time.sleep(INTERVAL)
        finally:
            if msrun.returncode != 0:
                self._kill_all()
                msrun.wait()
            for log in self.logs.values():
                log.finish()
        if msrun.returncode == 0:
            return 0
        if all(os.path.exists(os.path.join(self.folder, f"finished.{rank}")) for rank in self.ranks):
            say("MindSpore failed while its processes took leave of each other; all had finished their work")
            return 0
        return self._report()

    def _look(self):
        now = time.monotonic()
        self.scheduler.look(os.path.join(self.folder, "python.MS_SCHED.0"), now)
        ended = []
        for rank, process in self.workers.items():
            if process.look(os.path.join(self.folder, f"python.MS_WORKER.{rank}"), now):
                ended.append(process)
            self.logs[rank].read_on(now)
        self._ask_msrun(now)
        for process in ended:
            if self._named not in (None, process.pid) and process.code == -signal.SIGKILL:
                process.code = None  # msrun killed it because of the other
        if self._failed_at is None and any(process.failed() for process in self.workers.values()):
            self._failed_at = now

    def _ask_msrun(self, now):
        """msrun's own word on a worker's end, for one that it has collected before we could look."""
        if self._named is not None:
            return
        with open(self.msrun_log, "rb") as file:
            found = MSRUN_NAMES.search(file.read())
        if found:
            self._named = int(found[1])
            for process in self.workers.values():
                if process.pid == self._named:
                    process.code, process.end_time = int(found[2]), process.end_time or now

    def _hand_on_signals(self):
        if self.received.count(signal.SIGINT) > 1:
            self._kill_all()
        for process in self.workers.values():
            if self.received and process.runs and not process.told_to_end:
                process.told_to_end = True
                # Not to its group: what the script itself starts is the script's to end.
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process.pid, signal.SIGTERM)

    def _end_what_waits_in_vain(self):
        running = any(process.runs for process in self.workers.values())
        alone = self.nodes == 1 or self.received
        if alone and self._failed_at is not None and not running and self.scheduler.runs:
            # It would wait for the dead: MS_NODE_TIMEOUT, or before they have met, the whole
            # --cluster_time_out. On several nodes it has to tell the others first.
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.scheduler.pid, signal.SIGKILL)
        lost = self.scheduler.failed() and time.monotonic() - self.scheduler.end_time > LOST_SCHEDULER
        if running and lost:
            self._kill_all()

    def _kill_all(self):
        """Kill all that has our folder in its PATH: msrun, scheduler, workers, what they started."""
        mark = os.fsencode(self.folder)
        for name in filter(str.isdigit, os.listdir("/proc")):
            with contextlib.suppress(OSError):  # it has ended, or is another user's
                with open(f"/proc/{name}/environ", "rb") as file:
                    ours = mark in file.read()
                if ours:
                    os.kill(int(name), signal.SIGKILL)

    def _first_failure(self):
        """The rank that failed first, by exit status or error line; None if none did."""
        candidates = []
        for rank, process in self.workers.items():
            times = [process.end_time] if process.failed() else []
            if process.code != 0:
                end = self._failed_at or time.monotonic()
                times += [moment for moment in self.logs[rank].error_times if 0 <= end - moment <= ERROR_AGE]
            if times:
                candidates.append((min(times), process.pid != self._named, not process.failed(), rank))
        return min(candidates)[-1] if candidates else None

    def _report(self):
        """Say on stderr what went wrong; returns the exit status."""
        codes = {process.code for process in self.workers.values()} - {0, None}
        if self.received and (codes <= BROKEN_OFF or self.received.count(signal.SIGINT) > 1):
            say(f"interrupted; logs in {self.log_dir}")
            return 128 + self.received[0]
        scheduler = Log(os.path.join(self.log_dir, "scheduler.log"))
        lost = LOST_RANK.search("\n".join(scheduler.lines())) if self.ranks[0] == 0 else None
        if lost and int(lost[1]) not in self.ranks:
            node = int(lost[1]) // len(self.ranks)
            say(f"rank {lost[1]} failed first, or its connection: it no longer answered; "
                f"what launch.py says on node {node} tells why")
            return 1
        rank = self._first_failure()
        # With 2 it has refused bad input, as the workers do: it runs the same script until they meet.
        alone = self.scheduler.failed() and self.scheduler.code != 2
        if rank is None or alone and self.scheduler.end_time < (self._failed_at or 0):
            log = scheduler if scheduler.lines() else Log(self.msrun_log)
            return show_end(log, "the job failed, and no worker before it", 2 if self.scheduler.code == 2 else 1)
        return self._report_rank(rank)

    def _report_rank(self, rank):
        log, code = self.logs[rank], self.workers[rank].code
        lines = log.lines()
        sentences = [line for line in lines if line.startswith("error: ")]
        unexpected = bool(sentences) and sentences[-1].startswith(UNEXPECTED)
        if code is None and sentences and not unexpected and not any(line.startswith("Traceback") for line in lines):
            code = 2  # `telechat.cli.run` had said why, and msrun did not wait for the end
        if any(NOT_MET in line for line in lines):
            say("error: the processes did not all find each other in time; start every node with the same "
                "-n, --nodes and --master and its own --node_rank, or give more --cluster_time_out")
        elif unexpected or sentences and code == 2:
            if not any(sentences[-1] in other.said for other in self.logs.values()):
                say(sentences[-1])
        else:
            where = " on this node" if self.nodes > 1 else ""
            return show_end(log, f"rank {rank} failed first{where}, {describe(code)}", 2 if code == 2 else 1)
        say(f"rank {rank} failed first; its log is {log.path}")
        return 2 if code == 2 else 1


def describe(code):
    """An exit code of `subprocess` in words."""
    if code is None:
        return "by the error in its log"
    if code == -signal.SIGKILL:
        return "killed by SIGKILL (by hand, or by the system when memory ran out)"
    if code == -signal.SIGTERM:
        return "ended by SIGTERM (MindSpore sends it to itself when it has lost another process)"
    return f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit status {code}"
