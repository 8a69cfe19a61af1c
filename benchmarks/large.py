"""The real TeleChat-1B shape in float32 and lower: loading, decoding and peak memory."""

from benchmarks import decoding, measure
from benchmarks.report import Row, Section
from benchmarks.workspace import GROUP, SIZES, prompts, weight_bytes

NEW = 32
RESERVE = 500e6  # bytes that may be resident beside lower weights
# Bits of a product's weight → the most that a token's time may be of torch's in bfloat16; what is not a product's is bfloat16.
LOWER = {16: 0.65, 8: 0.42, 4: 0.35}


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
    for bits, goal in LOWER.items():
        name = "bfloat16" if bits == 16 else f"int{bits}"
        quantised = None if bits == 16 else workspace.quantised(size, bits)
        lower, _ = decoding.compare(size, dict(keywords, dtype="bfloat16", quantised=quantised), workspace.rounds,
                                    ("ours", "best"))
        held = lower["ours"][0]["weights"]
        rows += [
            Row(f"decode, a token, {size}, batch 1, {name}", "ms", goal_best=goal, **scaled(medians(lower, "token"), 1e3)),
            Row(f"peak memory of loading and decoding, {size}, {name}", "MB", limit=(held + RESERVE) / 1e6,
                limit_text=f"the weights, {held / 1e6:,.0f} MB, + {RESERVE / 1e6:.0f} MB",
                **scaled(medians(lower, "memory"), 1e-6)),
        ]
    return Section(rows, notes=[
        f"{size}: {weights / 1e9:.2f} GB of weights in float32, {read / 1e9:.2f} GB of them read for a token, prompt "
        f"{decoding.PROMPT}, {NEW} new tokens; memory was read at {bandwidth / 1e9:.1f} GB/s in the same run.",
        f"int8 and int4: products in groups of {GROUP} inputs with a float32 scale each, embedding and head in bfloat16, "
        f"feed-forward layers widened by zeros from {SIZES[size]['ffn_hidden_size']:,} to whole groups; *best* is torch in "
        "bfloat16 there too. Tokens were those of the dequantised weights in float32.",
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
