"""How many of the machine's cores a process may count on."""

import os


def own_cores():
    """This process's share of the cores that it and the job's other processes may run on; at least 1."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(cores // int(os.environ.get("MS_WORKER_NUM") or os.environ.get("RANK_SIZE") or 1), 1)
