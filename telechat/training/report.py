"""What a run shows: a line a step, ``metrics.jsonl``, the curves in ``loss.png``, and ``report.html``."""

import os
import sys
import time

from telechat.progress import duration
from telechat.training.html_report import write_report
from telechat.training.step_log import StepLog

COLUMNS = 80
BAR = 10  # characters


def step_line(number, total, result, speed, seconds_left, bar=False, seconds=None):
    """What is printed of a step: at most 80 columns. What there is no room for is left out: learning rate, loss scale.

    Args:
        number, total (int): step (1 first), and how many there are.
        result (StepResult): of it.
        speed (float): tokens a second.
        seconds_left (float): of the run.
        bar (bool): draw how far the run is, where there is room.
        seconds (float): that the step took; None: not told.
    """
    outcome = f"loss {result.loss:.4f}" if not result.skipped else f"loss {result.loss:.4g}: SKIPPED"
    rate = f"lr {result.learning_rate:.2e}"
    scale = "" if result.loss_scale is None else f"scale {result.loss_scale:g}"
    overflows = f"{result.overflows} overflows" if result.overflows else ""
    for left_out in ((), (rate,), (rate, scale), (rate, scale, overflows)):
        words = [f"step {number:{len(str(total))}d}/{total}", outcome, rate, f"grad {result.grad_norm:.3g}", scale, overflows,
                 f"{speed:.0f} tok/s", "" if seconds is None else f"{seconds * 1000:.0f} ms",
                 f"left {duration(seconds_left)}"]
        line = " ".join(word for word in words if word and word not in left_out)
        if len(line) <= COLUMNS:
            break
    if len(line) > COLUMNS:
        line = " ".join(line.split())  # numbers of steps then stand no longer one below the other
    if bar and len(line) + BAR + 3 <= COLUMNS:
        done = BAR * number // max(total, 1)
        line += f" [{'#' * done}{'.' * (BAR - done)}]"
    return line


class Report:
    """Prints and records the steps of one run.

    Args:
        output_dir (str): where ``metrics.jsonl`` and ``loss.png`` go.
        total_steps (int): of the run.
        first_step (int): where the run resumes; what an earlier process wrote of later steps, between
            its last checkpoint and its end, is dropped since these steps are done again.
        config (str): the resolved configuration, to be shown in ``report.html``; None: no such file.
        log (TensorBoardLog): gets every record too.
        answers (SampleAnswers): are shown in ``report.html``.
        time_left (TimeLeft): is told what the steps take, and asked.
    """

    def __init__(self, output_dir, total_steps, first_step=0, config=None, log=None, answers=None, time_left=None):
        self.image = os.path.join(output_dir, "loss.png")
        self.html = os.path.join(output_dir, "report.html")
        self.config = config
        self.log = log
        self.answers = answers
        self.total_steps = total_steps
        self.metrics = StepLog(os.path.join(output_dir, "metrics.jsonl"), first_step)
        self.records = self.metrics.records
        self._time_left = time_left

    def step(self, number, result, tokens, seconds):
        """Record step ``number`` (1 first): a StepResult, the tokens it saw, and how long it took."""
        left = (self.total_steps - number) * seconds
        if self._time_left:
            self._time_left.took("step", seconds, number)
            left = self._time_left.after(number)
        print(step_line(number, self.total_steps, result, tokens / seconds, left, sys.stdout.isatty(), seconds), flush=True)
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
        self.metrics.add(record)
        if self.log:
            self.log.write(record)

    def summary(self):
        """What the run came to, as printable lines."""
        steps = [record for record in self.records if "loss" in record]
        evaluations = [record for record in self.records if "evaluation_loss" in record]
        lines = [f"tokens:     {sum(record['tokens'] for record in steps):,} in {len(steps):,} steps, "
                 f"{duration(sum(record['seconds'] for record in steps))} of training"]
        if evaluations:
            best = min(evaluations, key=lambda record: record["evaluation_loss"])
            lines.append(f"evaluation: loss {evaluations[-1]['evaluation_loss']:.4f}, "
                         f"best {best['evaluation_loss']:.4f} at step {best['step']}")
        return lines

    def draw(self):
        """Write ``report.html``, and ``loss.png``: training and evaluation loss, learning rate, gradient norm."""
        if self.config is not None:
            write_report(self.html, self.records, self.total_steps, self.config,
                         self.answers.answers if self.answers else [], self.answers is None or self.answers.held_out)
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
        if self.log:
            self.log.close()


class SilentReport:
    """Stands in for `Report` on every process but the one that reports."""

    def step(self, number, result, tokens, seconds):
        """Say nothing."""

    def evaluation(self, number, loss):
        """Say nothing."""

    def summary(self):
        """Nothing to say."""
        return []

    def draw(self):
        """Draw nothing."""

    def close(self):
        """There is nothing to close."""
