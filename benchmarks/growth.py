"""How time and memory grow with the work, ours and the peer's, as exponents of a power law."""

import dataclasses

from benchmarks import measure, training
from benchmarks.report import Section, number
from benchmarks.workspace import prompts

LENGTHS = (256, 512, 1024, 2048, 4096, 8192)
BATCHES = (1, 2, 4, 8, 16)
# The official code holds several tensors of scores at once in training: 2.1 GB each at 8,192 tokens and 8 heads.
LONGEST_OFFICIAL_TRAINING = 4096
TOLERANCE = 0.05  # by how much an exponent of ours may be above one of theirs, as measured ones scatter


@dataclasses.dataclass(frozen=True)
class Series:
    """One thing that grows: S's width with ``layers``, all else as the defaults say."""

    what: str
    grows: str  # the field that takes the sizes
    sizes: tuple
    trains: bool
    layers: int = 2
    rows: int = 1
    length: int = 256  # of the training sequence or the prompt
    new_tokens: int = 1


SERIES = [
    Series("training step, sequence length", "length", LENGTHS, trains=True),
    Series("training step, batch", "rows", BATCHES, trains=True),
    Series("training step, layers", "layers", (2, 4, 8, 16, 32), trains=True),
    Series("generate, prompt length", "length", LENGTHS, trains=False),
    Series("generate, new tokens", "new_tokens", (64, 128, 256, 512, 1024, 2048), trains=False, length=32),
    Series("generate, batch", "rows", BATCHES, trains=False, length=32, new_tokens=64),
    Series("generate, layers", "layers", (2, 4, 8, 16, 32), trains=False, length=32, new_tokens=64),
]


def measure_point(workspace, series, size):
    """{side: (seconds, bytes)} at one size, numbers checked; bytes are beyond what the loaded modules take."""
    point = dataclasses.replace(series, **{series.grows: size})
    weights = workspace.weights("S", point.layers)
    sides = ["ours", "official", "best"]
    if point.trains:
        if point.length > LONGEST_OFFICIAL_TRAINING:
            sides.remove("official")
        keywords = dict(weights=weights, batches=workspace.batches("S", point.rows, point.length, count=2)[0], steps=2)
        results = measure.side_by_side("training", sides, keywords, 1)
        training.check(f"{series.what} {size}", results)
    else:
        keywords = dict(weights=weights, prompts=prompts("S", point.rows, point.length), new_tokens=point.new_tokens,
                        calls=2)
        results = measure.side_by_side("decoding", sides, keywords, 1)
        for side in sides:
            measure.check_equal(f"{series.what} {size}, ours against {side}", results["ours"][0]["tokens"],
                                results[side][0]["tokens"])
    # Of a call to generate, the memory until its end: the check that follows computes the logits of the whole prompt.
    time, memory = ("seconds", "peak_memory") if point.trains else ("call", "memory")
    return {side: (rounds[0][time], rounds[0][memory] - rounds[0]["memory_before"]) for side, rounds in results.items()}


def exponent(sizes, values):
    """The slope of log(value) over log(size), by least squares; None for fewer than two sizes."""
    import numpy as np

    return float(np.polyfit(np.log(sizes), np.log(values), 1)[0]) if len(sizes) > 1 else None


def grows_faster(ours, theirs):
    """Whether ours has the larger exponent, over the sizes that both were measured at; lists of (size, value)."""
    common = {size for size, _ in theirs}
    slope = exponent(*zip(*(pair for pair in ours if pair[0] in common)))
    return slope > exponent(*zip(*theirs)) + TOLERANCE


def run(workspace):
    """All series; `Section`."""
    lines, tables, points = [], [], {}
    for series in SERIES[::3] if workspace.quick else SERIES:
        sizes = series.sizes[:2] if workspace.quick else series.sizes
        measured = {size: measure_point(workspace, series, size) for size in sizes}
        sides = ("ours", "official", "best")
        for place, figure in enumerate(("time", "memory")):
            values = {side: [(size, measured[size][side][place]) for size in sizes if side in measured[size]]
                      for side in sides}
            slopes = {side: exponent(*zip(*pairs)) for side, pairs in values.items()}
            last = {side: exponent(*zip(*pairs[-2:])) for side, pairs in values.items()}
            faster = [side for side in ("official", "best") if grows_faster(values["ours"], values[side])]
            lines.append([series.what, figure, *(f"{slopes[side]:.2f} ({last[side]:.2f})" for side in sides),
                          "no: faster than " + " and ".join(faster) if faster else "yes"])
            points[f"{series.what}, {figure}"] = values
        cells = [[f"{size:,}", *(_cell(measured[size].get(side)) for side in sides)] for size in sizes]
        tables.append((series.what, ["size", *sides], cells))
    exponents = ("Exponents: fitted over all sizes (between the last two)",
                 ["what grows", "figure", "ours", "official", "best", "ours grows no faster"], lines)
    return Section(tables=[exponents, *tables], points=points, notes=[
        "S's width, 2 layers unless they grow; training 1 × 256 unless these grow; new tokens, batch and layers of "
        "generate with a prompt of 32, and 64 new tokens unless these grow; one process a figure.",
        "Memory is the process's peak less what it had before the model was loaded.",
        f"An exponent counts as larger from {TOLERANCE} on, over the sizes that both sides were measured at.",
        f"The official code's training is measured up to {LONGEST_OFFICIAL_TRAINING:,} tokens: at {LENGTHS[-1]:,} each "
        "of the several tensors of scores that it holds at once takes 2.1 GB."])


def _cell(figures):
    return "–" if figures is None else f"{number(figures[0])} s, {number(figures[1] / 1e6)} MB"
