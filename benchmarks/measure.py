"""Measuring in processes of their own: alternating sides, medians, peak memory.

A side is a function of a module in this folder that takes keywords and returns a dict of figures. It is run as
``python -m benchmarks.measure MODULE FUNCTION KEYWORDS RESULT`` so that nothing of one measurement is in another's
memory or caches.
"""

import importlib
import json
import os
import pathlib
import re
import statistics
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parents[1]


class NumbersDiffer(Exception):
    """Two sides did not compute the same; their times would mean nothing."""


class ChildFailed(Exception):
    """A measurement ended with an error; the message holds the end of what it printed."""


def run_child(module, function, keywords):
    """Run ``benchmarks.<module>.<function>(**keywords)`` in a process of its own.

    Returns:
        dict: its figures and ``peak_memory`` in bytes; a figure called ``ready_at`` (of `time.monotonic`) is
        replaced by ``ready_after``, the seconds since the process was started.

    Raises:
        ChildFailed: it ended with an error.
    """
    with tempfile.TemporaryDirectory() as folder:
        result = os.path.join(folder, "result.json")
        path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        command = [sys.executable, "-m", "benchmarks.measure", module, function, json.dumps(keywords), result]
        started = time.monotonic()
        child = subprocess.run(command, cwd=folder, env={**os.environ, "PYTHONPATH": path, "GLOG_v": "3"},
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
        if child.returncode:
            raise ChildFailed(f"{module}.{function}({keywords}) ended with status {child.returncode}:\n"
                              f"{child.stdout[-3000:]}")
        figures = json.loads(pathlib.Path(result).read_text())
    if "ready_at" in figures:
        figures["ready_after"] = figures.pop("ready_at") - started
    return figures


def side_by_side(module, functions, keywords, rounds, prepare=None):
    """Run each function ``rounds`` times, in turn, every other round backwards; ``prepare()`` before each run.

    Returns:
        {function: list of its figures, a dict a round}
    """
    results = {function: [] for function in functions}
    for number in range(rounds):
        for function in functions if number % 2 == 0 else list(functions)[::-1]:
            if prepare:
                prepare()
            figures = run_child(module, function, keywords)
            results[function].append(figures)
            shown = ", ".join(f"{name} {figures[name]:.4g}" for name in sorted(figures)
                              if isinstance(figures[name], (int, float)))
            print(f"  {module} {function}, round {number + 1}: {shown}", flush=True)
    return results


def median(results, name):
    """The median of a figure over the rounds of one side."""
    return statistics.median(figures[name] for figures in results)


def check_close(what, ours, theirs, tolerance):
    """Raise NumbersDiffer unless two equally long lists of numbers agree within a relative tolerance."""
    if len(ours) != len(theirs) or not all(abs(a - b) <= tolerance * abs(b) for a, b in zip(ours, theirs)):
        raise NumbersDiffer(f"{what}: {ours} against {theirs}, not within {tolerance:g}")


def check_near(what, ours, theirs, tolerance):
    """Raise NumbersDiffer unless two equally long lists of numbers differ by a share of their largest at most."""
    allowed = tolerance * max(map(abs, theirs))
    if len(ours) != len(theirs) or not all(abs(a - b) <= allowed for a, b in zip(ours, theirs)):
        raise NumbersDiffer(f"{what}: {str(ours)[:400]} against {str(theirs)[:400]}, not within {allowed:g}")


def check_equal(what, ours, theirs):
    """Raise NumbersDiffer unless both are the same."""
    if ours != theirs:
        raise NumbersDiffer(f"{what}: {str(ours)[:400]} against {str(theirs)[:400]}")


def seconds_of(function, times):
    """The median time of ``times`` calls, in seconds."""
    taken = []
    for _ in range(times):
        started = time.perf_counter()
        function()
        taken.append(time.perf_counter() - started)
    return statistics.median(taken)


def peak_memory():
    """The most memory that this process has had resident so far, in bytes."""
    status = pathlib.Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) * 1024


def resident_memory():
    """The memory that this process has resident now, in bytes."""
    return int(pathlib.Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def use_memory(size):
    """In a child: write to ``size`` bytes of memory, or to half of what is available where that is less."""
    import numpy as np

    from telechat.memory_check import available_bytes

    np.ones(min(size, (available_bytes() or size) // 2), np.uint8)
    return {}


def read_bandwidth(gigabytes=1.0):
    """How fast memory is read, in bytes a second: the fastest of several passes of two kinds, by torch.

    A sum reads and does next to nothing; a matrix times a vector is what decoding does.
    """
    import torch

    columns = 4096
    matrix = torch.ones(int(gigabytes * 1e9) // 4 // columns, columns)
    vector = torch.ones(columns)
    fastest = min(seconds_of(work, 1) for _ in range(5) for work in (matrix.sum, lambda: matrix @ vector))
    return {"bandwidth": matrix.numel() * 4 / fastest}


def main(module, function, keywords, result):
    """In the child."""
    figures = getattr(importlib.import_module(f"benchmarks.{module}"), function)(**json.loads(keywords))
    figures["peak_memory"] = peak_memory()
    pathlib.Path(result).write_text(json.dumps(figures))


if __name__ == "__main__":
    main(*sys.argv[1:])
