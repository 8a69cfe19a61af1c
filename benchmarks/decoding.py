"""Time a token in decoding, and of a whole call that generates, with the graphs compiled."""

import pathlib
import time

from benchmarks import measure
from benchmarks.report import Row, Section
from benchmarks.workspace import config_of, prompts, weight_bytes

PROMPT, NEW = 32, 128
CASES = [("S", 1), ("S", 8), ("M", 1)]  # size, prompts at a time


def ours(weights, prompts, new_tokens, calls):
    """In a child: the library's `Generator`; the first call of each kind is not timed.

    Returns the figures of `_calls`.
    """
    import mindspore  # noqa: F401  telechat imports it at first use only

    import telechat

    started_with = measure.peak_memory()
    model = telechat.TeleChat.from_pretrained(weights)
    generator = telechat.Generator(model, len(prompts[0]) + new_tokens, batch_size=len(prompts))
    return _calls(lambda count: generator.generate(prompts, telechat.SamplingParams(count)),
                  new_tokens, calls, started_with)


def official(weights, prompts, new_tokens, calls):
    """In a child: as `ours`, by torch as the official code has it."""
    return _torch("official", weights, prompts, new_tokens, calls)


def best(weights, prompts, new_tokens, calls):
    """In a child: as `ours`, by torch at its best; the weights stay where their files are mapped."""
    return _torch("best", weights, prompts, new_tokens, calls, share_file=True)


def _torch(grade, weights, prompts, new_tokens, calls, **options):
    import torch

    from benchmarks import peer_torch

    started_with = measure.peak_memory()
    model = peer_torch.load(grade, config_of(weights), weights, **options)
    ids = torch.tensor(prompts)
    return _calls(lambda count: model.generate(ids, count).tolist(), new_tokens, calls, started_with)


def _calls(generate, new_tokens, calls, started_with):
    """Time calls for one token (the prompt's pass) and for all; a token of decoding is the difference, shared out.

    Returns:
        dict: ``prompt``, ``call``, ``token`` in seconds, the ``tokens`` themselves, ``ready_at``, the moment of the
        first token, and ``memory_before``, in bytes, when only modules were loaded.
    """
    generate(1)
    ready_at = time.monotonic()
    figures = {"tokens": generate(new_tokens), "ready_at": ready_at, "memory_before": started_with}
    generate(1)  # after the long call, which may have changed what is kept between calls
    figures["prompt"] = measure.seconds_of(lambda: generate(1), calls)
    figures["call"] = measure.seconds_of(lambda: generate(new_tokens), calls)
    if new_tokens > 1:
        figures["token"] = (figures["call"] - figures["prompt"]) / (new_tokens - 1)
    return figures


def compare(size, keywords, rounds):
    """All sides on one size, checked to give the same tokens, and the bandwidth measured between the runs.

    Before each run the weight files are read, so that every side finds them in the page cache, and as much memory as
    two times the weights is used once: the host of a virtual machine hands out memory anew that has been idle, and
    5 GB of it took 8 s, which whoever came first had to pay.

    Returns:
        ({side: list of figures}, bandwidth in bytes a second)
    """
    bandwidths = []

    def prepare():
        bandwidths.append(measure.run_child("measure", "read_bandwidth", {}))
        read_files(keywords["weights"])
        measure.run_child("measure", "use_memory", dict(size=2 * weight_bytes(size)))

    results = measure.side_by_side("decoding", ["ours", "official", "best"], keywords, rounds, prepare)
    for side, figures in results.items():
        measure.check_equal(f"{size}, tokens, ours against {side}", results["ours"][0]["tokens"], figures[0]["tokens"])
    return results, measure.median(bandwidths, "bandwidth")


def read_files(directory):
    """Read all files of a directory and keep nothing."""
    buffer = bytearray(1 << 24)
    for path in pathlib.Path(directory).iterdir():
        with open(path, "rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def run(workspace):
    """S and M; `Section`."""
    tokens, whole, notes, points = [], [], [], {}
    for size, batch in CASES[:1] if workspace.quick else CASES:
        keywords = dict(weights=workspace.weights(size), prompts=prompts(size, batch, PROMPT),
                        new_tokens=16 if workspace.quick else NEW, calls=1 if workspace.quick else 3)
        results, bandwidth = compare(size, keywords, workspace.rounds)
        read = weight_bytes(size, read_in_decoding=True)
        floor = read / bandwidth
        goals = {}
        if size == "S":
            goals = dict(goal_official=0.15, goal_best=0.65, limit=2e3 * floor,
                         limit_text=f"2.0 × the weights once, {1e3 * floor:.2f} ms")
        medians = {name: {side: measure.median(figures, name) for side, figures in results.items()}
                   for name in ("token", "call")}
        tokens.append(Row(f"decode, a token, {size}, batch {batch}", "ms", **goals,
                          **{side: 1e3 * seconds for side, seconds in medians["token"].items()}))
        if batch == 1:
            goals = dict(goal_official=0.15, goal_best=0.70) if size == "S" else {}
            what = f"whole generate call, {size}, prompt {PROMPT} + {keywords['new_tokens']} new"
            whole.append(Row(what, "s", **goals, **medians["call"]))
            points[size] = {**medians["token"], "limit": floor, "bytes": read}
        notes.append(f"{size}, batch {batch}: memory was read at {bandwidth / 1e9:.1f} GB/s in the same run; a token "
                     f"reads {read / 1e6:.0f} MB of weights.")
    return Section(tokens + whole, notes=notes, points={"decode": points})
