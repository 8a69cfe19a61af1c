"""What a checkpoint or dataset directory holds, as lines for a person."""

import collections
import json
import math
import os

import numpy as np

from telechat.errors import InputError
from telechat.progress import track

BLOCK = "transformer.h."


def describe_checkpoint(directory, statistics=False):
    """Yield lines about a checkpoint: its architecture, tensors by kind, files, tokenizer, training state.

    Args:
        directory (str): with ``config.json`` and ``model*.safetensors``.
        statistics (bool): read every weight, for mean, standard deviation and extremes.

    Raises:
        InputError: it is no checkpoint, or one with missing or broken weights.
    """
    import mindspore  # noqa: F401: makes numpy know bfloat16

    from telechat.checkpoint.layout import parameter_shapes
    from telechat.adapters.peft import open_checkpoint

    reader, _ = open_checkpoint(directory)
    reader.check(parameter_shapes(reader.config))
    config = reader.config
    count = sum(math.prod(reader.shape(name)) for name in reader.names)
    yield f"checkpoint   {directory}"
    yield (f"model        {count:,} parameters: {config.n_layer} layers of {config.hidden_size}, {config.n_head} heads, "
           f"feed-forward {config.ffn_hidden_size}, vocabulary {config.vocab_size}")
    yield (f"positions    {config.position_embedding}, trained for sequences of {config.training_seqlen}; "
           f"head {'tied to the embedding' if config.tie_word_embeddings else 'of its own'}")
    for name in sorted(os.listdir(directory)):
        path = os.path.join(directory, name)
        if os.path.isfile(path):
            yield f"file         {name}: {os.path.getsize(path):,} bytes"
        else:
            yield f"directory    {name}: {len(os.listdir(path))} files"
    yield ""
    columns = "      mean       std       min       max" if statistics else ""
    yield f"{'tensor':48s} {'of each':>8s}  {'shape':18s} dtype{columns}"
    kinds = collections.OrderedDict()
    for name in reader.names:
        kinds.setdefault(_kind(name), []).append(name)
    for kind, names in kinds.items():
        shape = "×".join(map(str, reader.shape(names[0])))
        dtypes = ",".join(sorted({str(reader.dtype(name)) for name in names}))
        numbers = _statistics(reader, track(names, f"reading {kind}", "tensors")) if statistics else ""
        yield f"{kind[:48]:48s} {len(names):8d}  {shape:18s} {dtypes}{numbers}"


def _kind(name):
    """A layer's tensors go by one name."""
    if not name.startswith(BLOCK):
        return name
    return BLOCK + "*." + name[len(BLOCK):].partition(".")[2]


def _statistics(reader, names):
    from telechat.nn.quantised import QuantisedWeight

    count = total = squares = 0.0
    lowest, highest, wrong = math.inf, -math.inf, 0
    for name in names:
        values = reader.read(name)
        values = (values.dequantised() if isinstance(values, QuantisedWeight) else values).astype(np.float32)
        finite = np.isfinite(values)
        wrong += int((~finite).sum())
        values = values[finite]
        if values.size:
            count += values.size
            total += values.sum(dtype=np.float64)
            squares += np.square(values, dtype=np.float64).sum()
            lowest, highest = min(lowest, values.min()), max(highest, values.max())
    if not count:
        return "  nothing is finite"
    mean = total / count
    deviation = math.sqrt(max(squares / count - mean * mean, 0.0))
    note = f"  {wrong} NOT FINITE" if wrong else ""
    return f" {mean:9.2e} {deviation:9.2e} {lowest:9.2e} {highest:9.2e}{note}"


def describe_dataset(directory, samples=2, tokenizer=None, color=False):
    """Yield lines about a dataset: its settings and counts, and a few rows with what the loss counts marked.

    Args:
        directory (str): written by tools/preprocess.py.
        samples (int): rows to show.
        tokenizer (str): file or directory of the tokenizer that made it; None: it is looked for where it was then, and
            token ids are shown where it is gone.
        color (bool): mark by colour instead of ⟦ and ⟧.

    Raises:
        InputError: it is no dataset, or the tokenizer is another one than made it.
    """
    from telechat.data.encoding import IGNORED
    from telechat.data.packed_dataset import PackedDataset
    from telechat.data.tokenizer import Tokenizer

    dataset = PackedDataset(directory, batch_size=1, shuffle=False)
    settings = dataset.info["settings"]
    tok = _recorded_tokenizer(settings) if tokenizer is None else Tokenizer.from_pretrained(tokenizer)
    if tok is not None and tok.sha256 != settings["tokenizer"].get("sha256"):
        raise InputError(f"--tokenizer {tokenizer} is another one than {directory} was made with; give that one")
    try:
        yield from list(_dataset_lines(directory, dataset.info))
    except (KeyError, TypeError, ValueError):
        raise InputError(f"{os.path.join(directory, 'dataset.json')} does not describe a dataset; run tools/preprocess.py "
                         "again") from None
    if samples and tok is None:
        yield "             (give --tokenizer to read the rows as text)"
    batches = dataset.batches()
    for number in range(min(samples, dataset.num_packs)):
        ids, labels = (part[0].tolist() for part in next(batches))
        yield ""
        yield f"row {number}" + ("" if color else ": what the loss counts stands between ⟦ and ⟧")
        yield _marked(ids, [label != IGNORED for label in labels], settings["tokens"]["pad"]["id"], tok, color)


def _dataset_lines(directory, info):
    """What dataset.json says, in lines."""
    settings = info["settings"]
    yield f"dataset      {directory}: sequences of {settings['max_length']} tokens, seed {settings['seed']}"
    sources = ", ".join(f"{source['file']} × {source['weight']:g}" for source in settings["sources"])
    yield f"sources      {sources}"
    tokens = {role: item["token"] for role, item in settings["tokens"].items()}
    yield f"tokens       {json.dumps(tokens, ensure_ascii=False)}"
    for split in ("train", "eval"):
        counts = info[split]
        if counts is None:
            yield f"{split:12s} none"
            continue
        yield (f"{split:12s} {counts['packs']:,} rows of {counts['conversations']:,} conversations "
               f"({counts['dropped']:,} dropped, {counts['truncated']:,} cut), {counts['tokens']:,} tokens, "
               f"{counts['label_tokens']:,} of them count; {counts['padding_share']:.1%} filling")


def _recorded_tokenizer(settings):
    """The tokenizer where it was when the dataset was made; None where it is there no longer, or has changed."""
    from telechat.data.tokenizer import Tokenizer

    try:
        tok = Tokenizer.from_pretrained(settings["tokenizer"]["path"])
    except (KeyError, TypeError, InputError):
        return None
    return tok if tok.sha256 == settings["tokenizer"].get("sha256") else None


def _marked(ids, counted, pad, tok, color):
    """A row as text, filling in front left out."""
    start, end = ("\033[32m", "\033[0m") if color else ("⟦", "⟧")
    first = next((place for place, index in enumerate(ids) if index != pad), len(ids))
    parts = [f"(filling × {first}) "] if first else []
    place = first
    while place < len(ids):
        stop = place
        while stop < len(ids) and counted[stop] == counted[place]:
            stop += 1
        stretch = ids[place:stop]
        text = " ".join(map(str, stretch)) if tok is None else tok.decode(stretch)
        parts.append(f"{start}{text}{end}" if counted[place] else text)
        place = stop
    return (" " if tok is None else "").join(parts)
