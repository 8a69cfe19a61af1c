"""Time a token in decoding, and of a whole call that generates, with the graphs compiled."""

import pathlib
import time

from benchmarks import measure
from benchmarks.report import Row, Section
from benchmarks.workspace import config_of, prompts, weight_bytes

PROMPT, NEW = 32, 128
# Size, prompts at a time → the most that ours may be of the official and of the best.
CASES = {("S", 1): (0.15, 0.60), ("S", 8): (0.30, 0.60), ("M", 1): (0.50, 0.85)}
CALL_GOALS = {"S": dict(goal_official=0.15, goal_best=0.60)}  # of a whole call


def ours(weights, prompts, new_tokens, calls, dtype="float32", quantised=None):
    """In a child: the library's `Generator`; the first call of each kind is not timed.

    quantised: a checkpoint directory that is read instead of ``weights``.

    Returns the figures of `_calls`, and ``weights``, the bytes of the model's.
    """
    import mindspore  # noqa: F401  telechat imports it at first use only

    import telechat

    started_with = measure.peak_memory()
    model = telechat.TeleChat.from_pretrained(quantised or weights, dtype)
    generator = telechat.Generator(model, len(prompts[0]) + new_tokens, batch_size=len(prompts))
    figures = _calls(lambda count: generator.generate(prompts, telechat.SamplingParams(count)),
                     new_tokens, calls, started_with)
    return figures | {"logits": _some(model(prompts).asnumpy()[:, -1]),
                      "weights": sum(parameter.nbytes for parameter in model.get_parameters())}


def dequantised(quantised, prompts, new_tokens):
    """In a child: tokens of a quantised model with its products as float32 weights, all else rounded as bfloat16 is."""
    import numpy as np

    import telechat
    from telechat.checkpoint.dtypes import cast
    from telechat.nn.quantised import QuantisedWeight
    from telechat.quantization.checkpoint import QuantisedReader

    reader = QuantisedReader(quantised)

    def read(name, shape):
        weight = reader.read(name)
        if isinstance(weight, QuantisedWeight):
            return weight.dequantised()
        return cast(weight, "bfloat16", name).astype(np.float32)

    model = telechat.TeleChat(reader.config, tensors=read)
    generator = telechat.Generator(model, len(prompts[0]) + new_tokens, batch_size=len(prompts))
    return {"tokens": generator.generate(prompts, telechat.SamplingParams(new_tokens))}


def official(weights, prompts, new_tokens, calls):
    """In a child: as `ours`, by torch as the official code has it."""
    return _torch("official", weights, prompts, new_tokens, calls)


def best(weights, prompts, new_tokens, calls, dtype="float32", quantised=None):
    """In a child: as `ours`, by torch at its best and never quantised; float32 weights stay where files are mapped."""
    return _torch("best", weights, prompts, new_tokens, calls, share_file=dtype == "float32", dtype=dtype)


def _torch(grade, weights, prompts, new_tokens, calls, **options):
    import torch

    from benchmarks import peer_torch

    started_with = measure.peak_memory()
    model = peer_torch.load(grade, config_of(weights), weights, **options)
    ids = torch.tensor(prompts)
    figures = _calls(lambda count: model.generate(ids, count).tolist(), new_tokens, calls, started_with)
    with torch.inference_mode():
        return figures | {"logits": _some(model(ids)[:, -1].float().numpy())}


def _some(logits):
    """Some of the logits behind the prompts, to be compared."""
    return logits[:, :1000].ravel().tolist()


def _calls(generate, new_tokens, calls, started_with):
    """Time calls for one token (the prompt's pass) and for all; a token of decoding is the difference, shared out.

    Returns:
        dict: ``prompt``, ``call``, ``token`` in seconds, the ``tokens`` themselves, ``ready_at``, the moment of the
        first token, ``memory_before``, in bytes, when only modules were loaded, and ``memory``, the most until the end.
    """
    generate(1)
    ready_at = time.monotonic()
    figures = {"tokens": generate(new_tokens), "ready_at": ready_at, "memory_before": started_with}
    generate(1)  # after the long call, which may have changed what is kept between calls
    figures["prompt"] = measure.seconds_of(lambda: generate(1), calls)
    figures["call"] = measure.seconds_of(lambda: generate(new_tokens), calls)
    if new_tokens > 1:
        figures["token"] = (figures["call"] - figures["prompt"]) / (new_tokens - 1)
    figures["memory"] = measure.peak_memory()
    return figures


def compare(size, keywords, rounds, sides=("ours", "official", "best")):
    """Sides on one size, checked to give the same tokens, and the bandwidth measured between the runs.

    In a lower dtype, which each side rounds to where it sees fit, logits behind the prompt must agree, within a twentieth
    of the largest. Where ours is quantised, its tokens must be those of its dequantised weights.

    Before each run the weight files are read, so that every side finds them in the page cache, and as much memory as
    two times the weights is used once: the host of a virtual machine hands out memory anew that has been idle, and
    5 GB of it took 8 s, which whoever came first had to pay.

    Returns:
        ({side: list of figures}, bandwidth in bytes a second)
    """
    bandwidths = []

    def prepare():
        bandwidths.append(measure.run_child("measure", "read_bandwidth", {}))
        for name in ("weights", "quantised"):
            if keywords.get(name):
                read_files(keywords[name])
        measure.run_child("measure", "use_memory", dict(size=2 * weight_bytes(size)))

    results = measure.side_by_side("decoding", sides, keywords, rounds, prepare)
    bandwidth = measure.median(bandwidths, "bandwidth")
    if keywords.get("quantised"):
        expected = measure.run_child("decoding", "dequantised", {name: keywords[name] for name in
                                                                 ("quantised", "prompts", "new_tokens")})
        measure.check_equal(f"{size}, tokens, quantised against dequantised", results["ours"][0]["tokens"], expected["tokens"])
        return results, bandwidth
    for side in sides:
        mine, theirs = results["ours"][0], results[side][0]
        if keywords.get("dtype", "float32") == "float32":
            measure.check_equal(f"{size}, tokens, ours against {side}", mine["tokens"], theirs["tokens"])
        else:
            measure.check_near(f"{size}, logits, ours against {side}", mine["logits"], theirs["logits"], 0.05)
    return results, bandwidth


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
    for (size, batch), (of_official, of_best) in list(CASES.items())[:1 if workspace.quick else None]:
        keywords = dict(weights=workspace.weights(size), prompts=prompts(size, batch, PROMPT),
                        new_tokens=16 if workspace.quick else NEW, calls=1 if workspace.quick else 3)
        results, bandwidth = compare(size, keywords, workspace.rounds)
        read = weight_bytes(size, read_in_decoding=True)
        floor = read / bandwidth
        medians = {name: {side: measure.median(figures, name) for side, figures in results.items()}
                   for name in ("token", "call")}
        tokens.append(Row(f"decode, a token, {size}, batch {batch}", "ms", goal_official=of_official, goal_best=of_best,
                          **{side: 1e3 * seconds for side, seconds in medians["token"].items()}))
        if batch == 1:
            what = f"whole generate call, {size}, prompt {PROMPT} + {keywords['new_tokens']} new"
            whole.append(Row(what, "s", **CALL_GOALS.get(size, {}), **medians["call"]))
            points[size] = {**medians["token"], "limit": floor, "bytes": read}
        notes.append(f"{size}, batch {batch}: memory was read at {bandwidth / 1e9:.1f} GB/s in the same run; a token "
                     f"reads {read / 1e6:.0f} MB of weights.")
    return Section(tokens + whole, notes=notes, points={"decode": points})
