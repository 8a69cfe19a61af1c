"""MindSpore's profiler over some steps of a run, and a short table of what they spent their time on."""

import csv
import pathlib

from telechat.errors import InputError
from telechat.nn.kernels import on_cpu

WARM_UP = 2  # steps that are not profiled: they compile
SHOWN = 12  # kinds of operations in the table


class StepProfiler:
    """Profiles ``steps`` steps after the first two; its output goes to ``profile`` in ``output_dir``.

    Raises:
        InputError: the number of steps is wrong.
    """

    def __init__(self, output_dir, steps):
        if steps < 1:
            raise InputError(f"--profile must be a number of steps of at least 1, not {steps}")
        self.folder = pathlib.Path(output_dir) / "profile"
        self.steps = steps
        self._seen = 0
        self._profiler = None

    def begin_step(self):
        """To be called before each step."""
        if self._seen == WARM_UP:
            from mindspore import profiler

            activities = [profiler.ProfilerActivity.CPU]
            if not on_cpu():
                activities.append(profiler.ProfilerActivity.NPU)
            self._profiler = profiler.profile(
                activities=activities, on_trace_ready=profiler.tensorboard_trace_handler(str(self.folder)))
            self._profiler.start()
        self._seen += 1

    def end_step(self):
        """To be called behind each step; the printable lines of the table once all are profiled, else none."""
        if self._profiler is None:
            return []
        self._profiler.step()
        return self.finish() if self._seen == WARM_UP + self.steps else []

    def finish(self):
        """End profiling, also where the run ends early; the lines of the table."""
        if self._profiler is None:
            return []
        self._profiler.stop()
        self._profiler = None
        return [f"profile     {min(self._seen - WARM_UP, self.steps)} steps in {self.folder}", *summary(self.folder)]


def summary(folder):
    """The kinds of operations that took longest, as lines; empty where the profiler wrote no statistics.

    It writes op_statistic.csv on Ascend, cpu_op_type_info_*.csv on CPU (times in ms).
    """
    names = (("op_statistic.csv", "OP Type", "Count", "Total Time(us)", 1e-3),
             ("cpu_op_type_info_*.csv", "op_type", "type_occurrences", "total_compute_time", 1.0))
    for pattern, kind, count, time, factor in names:
        files = sorted(pathlib.Path(folder).rglob(pattern))
        if files:
            with open(files[-1], newline="", encoding="utf-8") as file:
                rows = [(row[kind], int(row[count]), float(row[time]) * factor) for row in csv.DictReader(file)]
            break
    else:
        return []
    total = sum(row[2] for row in rows) or 1.0
    rows.sort(key=lambda row: -row[2])
    lines = ["            operation                   calls    time ms   share"]
    lines += [f"            {name:24} {calls:8d} {ms:10.1f} {ms / total:7.1%}" for name, calls, ms in rows[:SHOWN]]
    if len(rows) > SHOWN:
        others = rows[SHOWN:]
        lines.append(f"            {len(others)} others               {sum(row[1] for row in others):8d} "
                     f"{sum(row[2] for row in others):10.1f} {sum(row[2] for row in others) / total:7.1%}")
    return lines
