"""How the processes of a job find each other, and who says so where they do not.

msrun starts the processes of one machine, its workers, and on the master's machine one more, the scheduler, to which
all report. Where a process fails, msrun ends the others of its machine within seconds: whoever tells why must come to it.
"""

import argparse
import contextlib
import os
import socket
import time

from telechat.errors import InputError
from telechat.parallel.parallel_config import process_count

# How MindSpore says that a process is missing, and that one has gone again before all had met.
NOT_MET = "Failed to initialize distributed job cluster because some processes"
GONE_AGAIN = "The state of the cluster is error", "The total number of timed out node"  # a worker; the scheduler
# Seconds that the processes of several nodes wait for each other, where nothing else is said. One may be missing:
# with 45 all have ended, and one has said so, within a minute (55 s measured).
SEVERAL_NODES_TIME_OUT = 45
# Seconds that a process leaves to the others of its machine: they may have begun to wait after it, and MindSpore
# takes some to end the one that has spoken.
LEFT_TO_OTHERS = 15


def meet(communication):
    """``communication.init()``, its failures as a sentence.

    A scheduler that finds another one at its port leaves the job to that one: msrun starts a scheduler wherever
    the master's address is the machine's own, so of two nodes on one machine, as one tries them out, each gets one.
    """
    if other_nodes_without_time_out(msrun_command()):
        os.environ["MS_TOPO_TIMEOUT"] = str(SEVERAL_NODES_TIME_OUT)
    patience = int(os.environ.get("MS_TOPO_TIMEOUT", "600"))  # msrun's --cluster_time_out
    started = time.monotonic()
    try:
        communication.init()
    except RuntimeError as error:
        in_vain = time.monotonic() - started >= patience  # else it has not waited: the port is taken
        address = scheduler_address()
        scheduler = os.environ.get("MS_ROLE") == "MS_SCHED"
        gone_again = any(words in str(error) for words in GONE_AGAIN)
        if scheduler and not in_vain and not gone_again and address and answers(address):
            print(f"{address[0]}:{address[1]} is in use: by the scheduler of another node on this machine, which "
                  "serves this one too; if there is none, give another --master_port", flush=True)
            raise SystemExit(0) from None
        if gone_again:
            time.sleep(LEFT_TO_OTHERS)  # one of this machine has said why, and this process is ended meanwhile
            reason = ("a process ended before all had found each other; what is said on its node, or its log, "
                      "tells why")
        elif NOT_MET in str(error):
            reason = (f"the {os.environ.get('MS_WORKER_NUM')} processes did not all find each other within "
                      f"{patience} s; start every node with the same number of processes and the same master address "
                      "and port, each with its own --node_rank, or give more --cluster_time_out")
        else:
            raise
        if scheduler:
            _wait_for_speaker()
        elif may_speak() and not _one_has_ended():
            raise InputError(reason) from None
        else:
            time.sleep(LEFT_TO_OTHERS)
        raise SystemExit(2) from None


def _speaker_name():
    """A name in Linux's abstract namespace, the same for all that one msrun has started; it goes with its process."""
    return f"\0telechat-speaker-{os.getppid()}"


def may_speak():
    """Whether this process is the first of its machine's, under one msrun, that asks: it says what concerns all."""
    speaker = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    try:
        speaker.bind(_speaker_name())
    except OSError:
        speaker.close()
        return False
    speaker.detach()  # open until the process has ended, which takes MindSpore some seconds more than Python
    return True


def _one_has_ended():
    """Whether a process that the same msrun started has ended, which msrun, looking once a second, is yet to see."""
    try:
        with open(f"/proc/{os.getppid()}/task/{os.getppid()}/children", encoding="ascii") as file:
            children = file.read().split()
    except OSError:  # the system does not say
        return False
    for child in children:
        with contextlib.suppress(OSError), open(f"/proc/{child}/stat", encoding="utf-8", errors="replace") as file:
            if file.read().rpartition(")")[2].split()[0] == "Z":
                return True
    return False


def _wait_for_speaker():
    """Wait until a worker of this machine has said what concerns all, and msrun has heard its end."""
    end = time.monotonic() + LEFT_TO_OTHERS
    while time.monotonic() < end:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
            if not listener.connect_ex(_speaker_name()):
                end = min(end, time.monotonic() + 2)
        time.sleep(0.2)


def msrun_command():
    """The words of the command that started this process; none where the system does not say."""
    try:
        with open(f"/proc/{os.getppid()}/cmdline", encoding="utf-8", errors="replace") as file:
            return file.read().split("\0")
    except OSError:
        return []


def _msrun_flags(words):
    """Those of msrun's flags that matter here, with its defaults."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for flag, default in (("--worker_num", "8"), ("--local_worker_num", "8"), ("--cluster_time_out", None)):
        parser.add_argument(flag, nargs="?", default=default)
    return parser.parse_known_args(words)[0]


def local_process_count():
    """How many of the run's processes are on this machine; all of them where msrun's command does not say."""
    count, local = process_count(), _msrun_flags(msrun_command()).local_worker_num
    return min(count, int(local)) if local and local.isdigit() and int(local) else count


def other_nodes_without_time_out(words):
    """Whether msrun's command counts on other nodes and does not say how long to wait for them (600 s then)."""
    msrun = _msrun_flags(words)
    return msrun.worker_num != msrun.local_worker_num and msrun.cluster_time_out is None


def scheduler_address():
    """Host and port of the job's scheduler, as msrun gives them; None outside of a job."""
    host, port = os.environ.get("MS_SCHED_HOST"), os.environ.get("MS_SCHED_PORT", "")
    return (host, int(port)) if host and port.isdigit() else None


def answers(address):
    """Whether anybody listens at (host, port)."""
    try:
        socket.create_connection(address, timeout=5).close()
        return True
    except OSError:
        return False
