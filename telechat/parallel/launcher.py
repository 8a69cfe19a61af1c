"""Start a script in many processes: what `tools/launch.py` asks of MindSpore's msrun, checked beforehand."""

import ctypes
import dataclasses
import errno
import os
import random
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import tempfile
import time

from telechat.cli import FINISHED, TRACEBACK_FOLDER
from telechat.errors import InputError
from telechat.parallel.msrun_job import MsrunJob
from telechat.parallel.rendezvous import SEVERAL_NODES_TIME_OUT

# Below 32768, where Linux starts to hand out ports by itself: a worker's own connection could
# otherwise take the port between our look at it and the scheduler's bind a few seconds later.
PORTS = range(20000, 32768)
# Seconds that the processes wait for each other at the start. On one host msrun sees a dead process by itself,
# and a slow start is no error.
ONE_HOST_TIME_OUT = 300
DEFAULT_VARIABLES = {
    # Seconds without a sign of life after which the scheduler counts a process on another node as dead.
    # MindSpore's own 30 ends the job 42 to 51 s later, near the minute that we promise; 20 took 21 to 24 s
    # and still bears a stall of 20 s. (On one host msrun sees the death within a second.)
    "MS_NODE_TIMEOUT": "20",
    "PYTHONUNBUFFERED": "1",  # a log is a file, and Python would hold 8 kB of it back
    "GLOG_v": "3",  # MindSpore's own messages: errors only, or they drown the progress of rank 0
}


@dataclasses.dataclass(frozen=True)
class Launch:
    """A script, its arguments and where its processes run.

    Raises (from `check`):
        InputError: the numbers do not fit, a file or msrun is missing, or the port cannot be used.
    """

    script: str
    arguments: tuple = ()
    processes: int = 1  # on all nodes together
    nodes: int = 1
    node_rank: int = 0  # this machine's number
    master: str = None  # "host:port" of node 0; None on one host: a free port
    log_dir: str = None  # None: a new directory under logs/
    cluster_time_out: int = None  # seconds; None: see above

    @property
    def local_processes(self):
        """Number of processes on this machine."""
        return self.processes // self.nodes

    @property
    def local_ranks(self):
        """The global ranks on this machine: nodes hold contiguous ranks, as msrun numbers them."""
        first = self.node_rank * self.local_processes
        return range(first, first + self.local_processes)

    def check(self):
        """Refuse what cannot work, before anything is started or written."""
        for flag, value in (("-n", self.processes), ("--nodes", self.nodes),
                            ("--cluster_time_out", self.cluster_time_out)):
            if value is not None and value < 1:
                raise InputError(f"{flag} must be at least 1, not {value}")
        if self.processes % self.nodes:
            raise InputError(f"-n {self.processes} counts the processes on all nodes and does not divide by "
                             f"--nodes {self.nodes}; every node runs equally many")
        if not 0 <= self.node_rank < self.nodes:
            raise InputError(f"--node_rank {self.node_rank} does not exist: --nodes {self.nodes} are "
                             f"numbered 0 to {self.nodes - 1}")
        if self.nodes > 1 and self.master is None:
            raise InputError(f"--nodes {self.nodes} needs --master HOST:PORT, an address of node 0 and a port "
                             "that is free there, the same on every node")
        if not os.path.isfile(self.script):
            raise InputError(f"{self.script} is not a file; give the script to run, as in: "
                             "python tools/launch.py -n 8 tools/train.py --config FILE")
        if self.master is not None:
            host, port = self.address()
            if self.node_rank == 0:
                check_port(host, port)
        if self.processes > 1:
            find_msrun()

    def address(self):
        """Host and port of the scheduler; a free port of this machine unless ``master`` is given.

        Raises InputError where ``master`` is not HOST:PORT.
        """
        if self.master is None:
            return "127.0.0.1", free_port()
        host, _, port = self.master.rpartition(":")
        host = host.removeprefix("[").removesuffix("]")
        if not host or not port.isascii() or not port.isdigit() or not 1024 <= int(port) <= 65535:
            raise InputError(f"--master {self.master} is not HOST:PORT with a port from 1024 to 65535; "
                             "give for example 10.0.0.1:8118")
        return host, int(port)

    def command(self, log_dir):
        """The msrun command line."""
        host, port = self.address()
        time_out = self.cluster_time_out or (SEVERAL_NODES_TIME_OUT if self.nodes > 1 else ONE_HOST_TIME_OUT)
        return [sys.executable, find_msrun(), f"--worker_num={self.processes}",
                f"--local_worker_num={self.local_processes}", f"--master_addr={host}",
                f"--master_port={port}", f"--node_rank={self.node_rank}", f"--log_dir={log_dir}", "--join=True",
                f"--cluster_time_out={time_out}",
                f"--tail_worker_log={self.processes}",  # no such rank: msrun itself shows no log
                self.script, *self.arguments]


def launch(plan):
    """Run a `Launch` to its end. One process alone takes this process's place: the call does not return.

    Rank 0's log goes to stdout as it grows; the rest, at a failure the rank that failed first and
    the end of its log, to stderr. At SIGINT, SIGTERM, SIGHUP and SIGUSR1 the workers are told to
    end (`MsrunJob`).

    Returns:
        int: 0; 2 where the rank that failed first ended with 2; 128 + the signal's number where the
        workers broke off because of one; else 1.

    Raises:
        InputError: see `Launch`.
    """
    plan.check()
    if plan.processes == 1:
        sys.stdout.flush()
        os.execv(sys.executable, [sys.executable, plan.script, *plan.arguments])
    log_dir = make_log_dir(plan)
    # Beside the logs rather than in /tmp, which is often mounted so that nothing in it can be executed.
    with tempfile.TemporaryDirectory(prefix=".launch-", dir=log_dir) as folder:
        write_python(folder, plan.node_rank)
        variables = {**DEFAULT_VARIABLES, **os.environ, TRACEBACK_FOLDER: log_dir,
                     FINISHED: os.path.join(folder, "finished"), "PATH": folder + os.pathsep + os.environ.get("PATH", os.defpath)}
        job = MsrunJob(plan.local_ranks, plan.nodes, log_dir, folder)
        libc = ctypes.CDLL(None)

        def prepare():
            libc.prctl(1, signal.SIGINT)  # 1 is PR_SET_PDEATHSIG
            # Slurm sends it to every process; msrun and the scheduler would die of it before the workers have saved.
            signal.signal(signal.SIGUSR1, signal.SIG_IGN)

        with job.signals(), open(job.msrun_log, "wb") as console:
            msrun = subprocess.Popen(
                plan.command(log_dir), env=variables, stdout=console, stderr=subprocess.STDOUT,
                # A Ctrl-C in the terminal goes to its whole process group, and msrun answers it by
                # killing the workers: it must not get it. Our own death it must get, or the workers would
                # live on without us.
                start_new_session=True, preexec_fn=prepare)
            first = "rank 0 on node 0 shows the progress, " if plan.node_rank else ""
            print(f"{plan.local_processes} of {plan.processes} processes here, {first}logs in {log_dir}",
                  file=sys.stderr, flush=True)
            return job.wait(msrun)


def write_python(folder, node_rank):
    """Put a ``python`` into ``folder`` that is the running interpreter and notes its process number.

    msrun starts "python" from PATH, whatever that may be, and never says which process is which rank.
    """
    path = os.path.join(folder, "python")
    lines = ["#!/bin/sh",
             "set -C  # a python that a worker starts in turn must not overwrite the worker's number",
             '{ echo $$ > "$0.$MS_ROLE.$RANK_ID"; } 2>/dev/null']
    if node_rank > 0:
        lines += ["# Two nodes on one machine: msrun would start a scheduler on either.",
                  'if [ "$MS_ROLE" = MS_SCHED ]; then exit 0; fi']
    lines.append(f'exec {shlex.quote(sys.executable)} "$@"')
    with open(path, "w", encoding="utf-8") as file:
        file.write("\n".join(lines) + "\n")
    os.chmod(path, 0o755)


def make_log_dir(plan):
    """Create the directory of logs, without this machine's logs of an earlier run; returns its path.

    Raises InputError where it cannot be written.
    """
    path = plan.log_dir or os.path.join("logs", time.strftime(f"launch_%Y%m%d-%H%M%S_{os.getpid()}"))
    path = os.path.abspath(path)
    names = [f"worker_{rank}.log" for rank in plan.local_ranks] + ["scheduler.log"] * (plan.node_rank == 0)
    try:
        os.makedirs(path, exist_ok=True)
        for name in names:
            if os.path.lexists(os.path.join(path, name)):
                os.remove(os.path.join(path, name))
    except OSError as error:
        raise InputError(f"--log_dir {plan.log_dir or path}: {error.strerror}; "
                         "give a directory that can be written") from None
    return path


def find_msrun():
    """Path of the msrun that belongs to the running interpreter, else of the first on PATH; InputError if none."""
    folders = [sysconfig.get_path("scripts"), os.environ.get("PATH", "")]
    path = shutil.which("msrun", path=os.pathsep.join(folders))
    if path is None:
        raise InputError(f"msrun is missing: install mindspore for {sys.executable}")
    return path


def free_port():
    """A TCP port of this machine that nobody listens on; InputError where none is found."""
    for port in random.sample(PORTS, 100):
        try:
            bind("127.0.0.1", port)
            return port
        except OSError:
            pass
    raise InputError("no free port found on this machine; name one with --master 127.0.0.1:PORT")


def check_port(host, port):
    """Raise InputError unless the scheduler can listen on ``host``:``port``, which must be this machine."""
    try:
        bind(host, port)
    except socket.gaierror:
        raise InputError(f"--master {host}:{port}: there is no host of that name; "
                         "give node 0's address") from None
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise InputError(f"--master {host}:{port}: the port is in use; give another one, or on one host "
                             "leave --master out") from None
        if error.errno == errno.EADDRNOTAVAIL:
            raise InputError(f"--master {host}:{port} is not an address of this machine, which is node 0; "
                             "give one that it has, or the right --node_rank") from None
        raise InputError(f"--master {host}:{port}: {error.strerror}; give another port") from None


def bind(host, port):
    """Bind a TCP socket and let it go again; raises OSError where that is not possible."""
    family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    with socket.socket(family, kind) as listener:
        # Connections that were closed a moment ago do not count.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
