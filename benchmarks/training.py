"""Time and peak memory of a training step."""

import statistics
import time

from benchmarks import measure
from benchmarks.report import Row, Section
from benchmarks.workspace import config_of, read_batches

RATE = 1e-4
CASES = [("S", 4, 256), ("M", 4, 256), ("S", 1, 2048)]  # size, rows, length
DROPOUT = 0.1  # 7B's, everywhere
FIRST_STEP = 2.0  # seconds at most
LORA_STEP = 0.75  # of a step that trains all weights, at most


def ours(weights, batches, steps, dtype="float32", adapted=False):
    """In a child: the library's training steps, one more first that is not timed.

    dtype "bfloat16": weights and products; torch's own way of that is autocast, with float32 weights. adapted (bool):
    trained is a LoRA adapter of rank 16 beside every product, in the place of all weights.
    """
    import mindspore  # noqa: F401  telechat imports it at first use only

    import telechat

    started_with = measure.peak_memory()
    model = telechat.TeleChat.from_pretrained(weights, dtype)
    began = time.perf_counter()
    trainer = telechat.Trainer(model, telechat.TrainConfig(learning_rate=RATE, lr_schedule="constant", dtype=dtype),
                               adapter=_adapter(model.config) if adapted else None)

    def step(input_ids, labels):
        result = trainer.train_step(input_ids, labels)
        return result.loss, result.grad_norm

    return _steps(step, read_batches(batches), steps, began, started_with)


def _adapter(config):
    from telechat.adapters.lora_config import LoraConfig
    from telechat.adapters.trained import TrainedAdapter, read_initial

    shape = LoraConfig(rank=16, alpha=32)
    return TrainedAdapter(config, shape, range(config.n_layer), read_initial(config, shape, 0))


def lora(weights, batches, steps):
    """In a child: `ours` with an adapter."""
    return ours(weights, batches, steps, adapted=True)


def official(weights, batches, steps):
    """In a child: as `ours`, by torch as the official code has it."""
    return _torch("official", weights, batches, steps)


def best(weights, batches, steps, dtype="float32"):
    """In a child: as `ours`, by torch at its best."""
    return _torch("best", weights, batches, steps, autocast=dtype == "bfloat16")


def _torch(grade, weights, batches, steps, autocast=False):
    import torch

    from benchmarks import peer_torch

    started_with = measure.peak_memory()
    model = peer_torch.load(grade, config_of(weights), weights)
    began = time.perf_counter()
    optimizer = model.optimizer(lr=RATE, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)

    def step(input_ids, labels):
        ids, targets = torch.from_numpy(input_ids[:, :-1]).long(), torch.from_numpy(labels[:, 1:]).long()
        return peer_torch.train_step(model, optimizer, ids, targets, RATE, autocast=autocast)

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


def check(what, results, losses=1e-3, norms=5e-3):
    """Raise NumbersDiffer unless the first round's losses and gradient norms agree with ours on every side.

    Norms less closely: torch's, in float32, of 16 million numbers is 0.7 thousandths under that in float64.
    """
    for side, rounds in results.items():
        for name, tolerance in (("losses", losses), ("norms", norms)):
            measure.check_close(f"{what}, {name}, ours against {side}", results["ours"][0][name], rounds[0][name],
                                tolerance)


def run(workspace):
    """Every size in float32 against both grades and in bfloat16 against autocast, and S with dropout; `Section`."""
    times, memory, notes, first = [], [], [], []
    steps = 2 if workspace.quick else 8

    def compare(what, sides, keywords, goals, memory_goals, **tolerances):
        results = measure.side_by_side("training", sides, dict(keywords, steps=steps), workspace.rounds)
        check(what, results, **tolerances)
        times.append(Row(f"training step, {what}", "s", **goals,
                         **{side: measure.median(rounds, "seconds") for side, rounds in results.items()}))
        memory.append(Row(f"peak memory of training, {what}", "MB", **memory_goals,
                          **{side: measure.median(rounds, "peak_memory") / 1e6 for side, rounds in results.items()}))
        return results

    for size, rows, length in CASES[:1] if workspace.quick else CASES:
        batches, share = workspace.batches(size, rows, length, count=4)
        keywords, what = dict(weights=workspace.weights(size), batches=batches), f"{size}, {rows} × {length:,}"
        results = compare(what, ["ours", "official", "best"], keywords, dict(goal_official=0.80, goal_best=0.90),
                          dict(goal_official=0.75, goal_best=0.85))
        if (size, length) == ("S", 256):
            first = [Row(f"first training step, {what}, of a process that has loaded the model", "s",
                         limit=FIRST_STEP, limit_text="stated",
                         **{side: measure.median(rounds, "first_step") for side, rounds in results.items()})]
        compare(f"{what}, bfloat16", ["ours", "best"], dict(keywords, dtype="bfloat16"), dict(goal_best=0.90), {},
                losses=5e-3, norms=0.1)
        if length == 256:
            results = measure.side_by_side("training", ["ours", "lora"], dict(keywords, steps=steps), workspace.rounds)
            # The first step's loss comes before any update, and an adapter begins as nothing.
            measure.check_close(f"{what}, first loss, with and without an adapter", results["ours"][0]["losses"][:1],
                                results["lora"][0]["losses"][:1], 1e-5)
            full = measure.median(results["ours"], "seconds")
            taken = measure.median(results["lora"], "seconds")
            times.append(Row(f"training step of a LoRA adapter, {what}", "s", taken,
                             limit=LORA_STEP * full, limit_text=f"{LORA_STEP} × a step that trains all, {full:.3g} s"))
        notes.append(f"{what}: {share:.1%} of the positions count.")
    batches, _ = workspace.batches("S", 4, 256, count=4)
    keywords = dict(weights=workspace.weights("S", dropout=DROPOUT), batches=batches)
    # Each side draws masks of its own.
    compare(f"S, 4 × 256, dropout {DROPOUT}", ["ours", "official", "best"], keywords,
            dict(goal_official=0.90, goal_best=1.00), {}, losses=2e-2, norms=0.3)
    notes += ["LoRA: rank 16 beside all six products of a layer, float32, in turns with a step that trains all.",
              "bfloat16: *best* is torch.autocast, with float32 weights; ours are bfloat16 with float32 master weights. "
              "Losses agree within 5e-3, gradient norms within 0.1.",
              f"Dropout {DROPOUT}: of the embedding, of attention's probabilities and of what both halves of a block "
              "add. Each side draws masks of its own, so losses agree within 2e-2 only."]
    return Section(times + first + memory, notes=notes)
