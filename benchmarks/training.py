"""Time and peak memory of a training step."""

import statistics
import time

from benchmarks import measure
from benchmarks.report import Row, Section
from benchmarks.workspace import config_of, read_batches

RATE = 1e-4
CASES = [  # size, rows, length
    ("S", 4, 256), ("M", 4, 256), ("S", 1, 2048),
]


def ours(weights, batches, steps):
    """In a child: the library's training steps, one more first that is not timed."""
    import mindspore  # noqa: F401  telechat imports it at first use only

    import telechat

    started_with = measure.peak_memory()
    model = telechat.TeleChat.from_pretrained(weights)
    began = time.perf_counter()
    trainer = telechat.Trainer(model, telechat.TrainConfig(learning_rate=RATE, lr_schedule="constant"))

    def step(input_ids, labels):
        result = trainer.train_step(input_ids, labels)
        return result.loss, result.grad_norm

    return _steps(step, read_batches(batches), steps, began, started_with)


def official(weights, batches, steps):
    """In a child: as `ours`, by torch as the official code has it."""
    return _torch("official", weights, batches, steps)


def best(weights, batches, steps):
    """In a child: as `ours`, by torch at its best."""
    return _torch("best", weights, batches, steps)


def _torch(grade, weights, batches, steps):
    import torch

    from benchmarks import peer_torch

    started_with = measure.peak_memory()
    model = peer_torch.load(grade, config_of(weights), weights)
    began = time.perf_counter()
    optimizer = model.optimizer(lr=RATE, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)

    def step(input_ids, labels):
        ids, targets = torch.from_numpy(input_ids[:, :-1]).long(), torch.from_numpy(labels[:, 1:]).long()
        return peer_torch.train_step(model, optimizer, ids, targets, RATE)

    return _steps(step, read_batches(batches), steps, began, started_with)


def _steps(step, batches, steps, began, started_with):
    """Take and time steps; ``first_step`` counts from ``began``, so the optimizer's state and compilation too."""
    ends, losses, norms = [], [], []
    for number in range(steps + 1):
        loss, norm = step(*batches[number % len(batches)])
        ends.append(time.perf_counter())
        losses.append(loss)
        norms.append(norm)
    taken = [end - start for start, end in zip(ends, ends[1:])]
    return {"seconds": statistics.median(taken), "first_step": ends[0] - began, "losses": losses, "norms": norms,
            "memory_before": started_with}


def check(what, results):
    """Raise NumbersDiffer unless the first round's losses and gradient norms agree with ours on every side.

    Norms less closely: torch's, in float32, of 16 million numbers is 0.7 thousandths under that in float64.
    """
    for side, rounds in results.items():
        for name, tolerance in (("losses", 1e-3), ("norms", 5e-3)):
            measure.check_close(f"{what}, {name}, ours against {side}", results["ours"][0][name], rounds[0][name],
                                tolerance)


def run(workspace):
    """Every size against both grades; `Section`."""
    times, memory, notes = [], [], []
    for size, rows, length in CASES[:1] if workspace.quick else CASES:
        batches, share = workspace.batches(size, rows, length, count=4)
        keywords = dict(weights=workspace.weights(size), batches=batches, steps=2 if workspace.quick else 8)
        results = measure.side_by_side("training", ["ours", "official", "best"], keywords, workspace.rounds)
        what = f"{size}, {rows} × {length:,}"
        check(what, results)
        times.append(Row(f"training step, {what}", "s", goal_official=0.90, goal_best=1.00,
                         **{side: measure.median(rounds, "seconds") for side, rounds in results.items()}))
        goals = dict(goal_official=1.0, goal_best=1.2) if length == 256 else {}
        memory.append(Row(f"peak memory of training, {what}", "MB", **goals,
                          **{side: measure.median(rounds, "peak_memory") / 1e6 for side, rounds in results.items()}))
        notes.append(f"{what}: {share:.1%} of the positions count.")
    return Section(times + memory, notes=notes)
