"""The real TeleChat-1B shape in float32 and lower: loading, decoding and peak memory, all from the same processes."""

from benchmarks import decoding, measure
from benchmarks.report import Row, Section
from benchmarks.workspace import prompts, weight_bytes

NEW = 32
RESERVE = 500e6  # bytes that may be resident beside lower weights
LOWER = {"bfloat16": (2, 0.65)}  # dtype → bytes of a weight, the most that a token's time may be of torch's in bfloat16


def run(workspace):
    """L, or S in its place in a quick run; `Section`."""
    size = "S" if workspace.quick else "L"
    keywords = dict(weights=workspace.weights(size), prompts=prompts(size, 1, decoding.PROMPT), new_tokens=NEW, calls=2)
    results, bandwidth = decoding.compare(size, keywords, workspace.rounds)
    token, ready, memory = (medians(results, name) for name in ("token", "ready_after", "memory"))
    read = weight_bytes(size, read_in_decoding=True)
    floor, weights = read / bandwidth, weight_bytes(size)
    rows = [
        Row(f"decode, a token, {size}, batch 1", "ms", goal_official=0.80, goal_best=0.95, limit=1.25e3 * floor,
            limit_text=f"1.25 × the weights once, {1e3 * floor:.1f} ms", **scaled(token, 1e3)),
        Row(f"peak memory of loading and decoding, {size}", "MB", goal_official=1.0,
            limit=1.05 * weights / 1e6 + 400, limit_text=f"1.05 × the weights, {weights / 1e6:,.0f} MB, + 400 MB",
            **scaled(memory, 1e-6)),
        Row(f"from starting the process to {size}'s first token", "s", goal_official=0.9, goal_best=1.2, **ready),
    ]
    for dtype, (width, goal) in LOWER.items():
        lower, _ = decoding.compare(size, dict(keywords, dtype=dtype), workspace.rounds, ("ours", "best"))
        held = weight_bytes(size, width=width)
        rows += [
            Row(f"decode, a token, {size}, batch 1, {dtype}", "ms", goal_best=goal, **scaled(medians(lower, "token"), 1e3)),
            Row(f"peak memory of loading and decoding, {size}, {dtype}", "MB", limit=(held + RESERVE) / 1e6,
                limit_text=f"the weights, {held / 1e6:,.0f} MB, + {RESERVE / 1e6:.0f} MB",
                **scaled(medians(lower, "memory"), 1e-6)),
        ]
    return Section(rows, notes=[
        f"{size}: {weights / 1e9:.2f} GB of weights in float32, {read / 1e9:.2f} GB of them read for a token, prompt "
        f"{decoding.PROMPT}, {NEW} new tokens; memory was read at {bandwidth / 1e9:.1f} GB/s in the same run.",
        "The weight files, float32, were read just before each run, so they were in the page cache for every side. *best* "
        "leaves float32 weights where the files are mapped; pages of a mapped file count as memory of the process while they "
        "are resident.",
    ], points={"decode": {size: {**token, "limit": floor, "bytes": read}}})


def medians(results, name):
    """A figure's median on each side."""
    return {side: measure.median(rounds, name) for side, rounds in results.items()}


def scaled(figures, factor):
    """The figures in another unit."""
    return {side: value * factor for side, value in figures.items()}
