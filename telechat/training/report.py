"""What a run shows: a line a step, ``metrics.jsonl`` and the curves in ``loss.png``."""

import json
import os
import time

from telechat.errors import InputError


def duration(seconds):
    """Seconds as h:mm:ss or m:ss."""
    minutes, seconds = divmod(max(int(round(seconds)), 0), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


class Report:
    """Prints and records the steps of one run.

    Args:
        output_dir (str): where ``metrics.jsonl`` and ``loss.png`` go.
        total_steps (int): of the run.
        first_step (int): where the run resumes; what an earlier process wrote of later steps, between
            its last checkpoint and its end, is dropped since these steps are done again.
    """

    def __init__(self, output_dir, total_steps, first_step=0):
        self.path = os.path.join(output_dir, "metrics.jsonl")
        self.image = os.path.join(output_dir, "loss.png")
        self.total_steps = total_steps
        self.records = [record for record in _read(self.path) if record["step"] <= first_step] if first_step else []
        try:
            self._file = open(self.path + ".partial", "w", encoding="utf-8")
            for record in self.records:
                self._file.write(json.dumps(record) + "\n")
            self._file.flush()
            os.replace(self.path + ".partial", self.path)
        except OSError as error:
            raise InputError(f"{self.path} cannot be written ({error.strerror}); give another output_dir") from None
        self._seconds = []

    def step(self, number, result, tokens, seconds):
        """Record step ``number`` (1 first): a StepResult, the tokens it saw, and how long it took."""
        # The first step compiles; it would spoil the estimate of the time left.
        self._seconds = [*self._seconds, seconds][-20:] if number > 1 else [seconds]
        typical = sorted(self._seconds)[len(self._seconds) // 2]
        left = duration(typical * (self.total_steps - number))
        width = len(str(self.total_steps))
        outcome = f"loss {result.loss:.4f}" if not result.skipped else f"loss {result.loss:.4g} not finite: skipped"
        scale = ""
        if result.loss_scale is not None:
            overflows = f"after {result.overflows} overflows " if result.overflows else ""
            scale = f"scale {result.loss_scale:g} {overflows}"
        print(f"step {number:{width}d}/{self.total_steps} {outcome} lr {result.learning_rate:.2e} "
              f"grad {result.grad_norm:.3g} {scale}{tokens / seconds:.0f} tok/s {seconds * 1e3:.0f} ms left {left}",
              flush=True)
        record = {"step": number, "loss": result.loss, "learning_rate": result.learning_rate,
                  "grad_norm": result.grad_norm, "tokens": tokens, "seconds": round(seconds, 4),
                  "skipped": result.skipped, "time": round(time.time(), 1)}
        if result.loss_scale is not None:
            record.update(loss_scale=result.loss_scale, overflows=result.overflows)
        self._write(record)

    def evaluation(self, number, loss):
        """Record the evaluation loss after step ``number``."""
        print(f"step {number}: evaluation loss {loss:.4f}", flush=True)
        self._write({"step": number, "evaluation_loss": loss})

    def _write(self, record):
        self.records.append(record)
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()

    def draw(self):
        """Write ``loss.png``: training and evaluation loss, learning rate, gradient norm."""
        # Imported here: a second that only the first drawing needs to pay.
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        steps = [record for record in self.records if "loss" in record]
        evaluations = [record for record in self.records if "evaluation_loss" in record]
        figure = Figure(figsize=(9, 8), layout="constrained")
        FigureCanvasAgg(figure)
        loss, rate, norm = figure.subplots(3, 1, sharex=True, height_ratios=(2, 1, 1))
        numbers = [record["step"] for record in steps]
        loss.plot(numbers, [record["loss"] for record in steps], label="training")
        if evaluations:
            loss.plot([record["step"] for record in evaluations],
                      [record["evaluation_loss"] for record in evaluations], "o-", label="evaluation")
        loss.set_ylabel("loss (cross entropy a token)")
        loss.legend()
        rate.plot(numbers, [record["learning_rate"] for record in steps], color="tab:green")
        rate.set_ylabel("learning rate")
        norm.plot(numbers, [record["grad_norm"] for record in steps], color="tab:purple")
        norm.set_ylabel("gradient norm")
        norm.set_xlabel("step")
        for axes in (loss, rate, norm):
            axes.grid(alpha=0.3)
        partial = self.image + ".partial"
        figure.savefig(partial, format="png", dpi=100)
        os.replace(partial, self.image)

    def close(self):
        self._file.close()


class SilentReport:
    """Stands in for `Report` on every process but the one that reports."""

    def step(self, number, result, tokens, seconds):
        """Say nothing."""

    def evaluation(self, number, loss):
        """Say nothing."""

    def draw(self):
        """Draw nothing."""

    def close(self):
        """There is nothing to close."""


def _read(path):
    """The records of an earlier process; a last line cut short by a crash is left out."""
    records = []
    if os.path.exists(path):
        with open(path, encoding="utf-8") as file:
            for line in file:
                try:
                    records.append(json.loads(line))
                except ValueError:
                    break
    return records
