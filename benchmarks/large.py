"""The real TeleChat-1B shape: loading, decoding and peak memory, all from the same processes."""

from benchmarks import decoding, measure
from benchmarks.report import Row, Section
from benchmarks.workspace import prompts, weight_bytes

NEW = 32


def run(workspace):
    """L, or S in its place in a quick run; `Section`."""
    size = "S" if workspace.quick else "L"
    keywords = dict(weights=workspace.weights(size), prompts=prompts(size, 1, decoding.PROMPT), new_tokens=NEW, calls=2)
    results, bandwidth = decoding.compare(size, keywords, workspace.rounds)
    medians = {name: {side: measure.median(rounds, name) for side, rounds in results.items()}
               for name in ("token", "ready_after", "peak_memory")}
    read = weight_bytes(size, read_in_decoding=True)
    floor, weights = read / bandwidth, weight_bytes(size)
    rows = [
        Row(f"decode, a token, {size}, batch 1", "ms", goal_official=0.80, goal_best=0.90, limit=1.25e3 * floor,
            limit_text=f"1.25 × the weights once, {1e3 * floor:.1f} ms",
            **{side: 1e3 * seconds for side, seconds in medians["token"].items()}),
        Row(f"peak memory of loading and decoding, {size}", "MB", goal_official=1.0,
            limit=1.05 * weights / 1e6 + 400, limit_text=f"1.05 × the weights, {weights / 1e6:,.0f} MB, + 400 MB",
            **{side: value / 1e6 for side, value in medians["peak_memory"].items()}),
        Row(f"from starting the process to {size}'s first token", "s", goal_official=1.0, **medians["ready_after"]),
    ]
    return Section(rows, notes=[
        f"{size}: {weights / 1e9:.2f} GB of weights in float32, {read / 1e9:.2f} GB of them read for a token, prompt "
        f"{decoding.PROMPT}, {NEW} new tokens; memory was read at {bandwidth / 1e9:.1f} GB/s in the same run.",
        "The weight files were read just before each run, so they were in the page cache for every side. *best* leaves "
        "the weights where the files are mapped; pages of a mapped file count as memory of the process while they are resident.",
    ], points={"decode": {size: {**medians["token"], "limit": floor, "bytes": read}}})
