"""How fast conversations become packs, against the incumbent's algorithm with the same tokenizer.

The incumbent tokenises every conversation three times: to know its length, again with the pack that it has joined,
to check the pack's length, and a third time for the ids that are written.
"""

import hashlib
import random
import time

from benchmarks import measure
from benchmarks.report import Row, Section
from benchmarks.workspace import published_text

MAX_LENGTH, SEED = 1024, 2024


def ours(file, tokenizer_file, output):
    """In a child: `telechat.data.preprocess` from JSONL to MindRecord."""
    import mindspore.mindrecord  # noqa: F401  imported by both sides before the clock starts
    import numpy as np

    from telechat.data import MixtureFile, PackedDataset, Tokenizer, preprocess

    tokenizer = Tokenizer.from_pretrained(tokenizer_file)
    started = time.perf_counter()
    info = preprocess([MixtureFile(file)], tokenizer, output, MAX_LENGTH, seed=SEED)
    seconds = time.perf_counter() - started
    dataset = PackedDataset(output, batch_size=1, shuffle=False)
    rows = [np.stack([ids[0], labels[0]]) for ids, labels in dataset.evaluation_batches()]
    return {"seconds": seconds, "tokens": info["train"]["tokens"], "packs": _digests(rows)}


def incumbent(file, tokenizer_file, output):
    """In a child: the incumbent's algorithm, from JSONL to MindRecord; it loses the last pack."""
    import numpy as np
    from mindspore.mindrecord import FileWriter

    from telechat.data import ChatFormat, Tokenizer, read_conversations

    tokenizer = Tokenizer.from_pretrained(tokenizer_file)
    chat_format = ChatFormat.for_tokenizer(tokenizer)
    width = MAX_LENGTH + 1

    def encode(conversations):
        start = [] if chat_format.start is None else [chat_format.start]
        ids, labels = [], []
        for turns in conversations:
            ids += start
            labels += [-100] * len(start)
            for question, answer in turns:
                asked = [chat_format.user, *tokenizer.encode(question, control_tokens=False), chat_format.bot]
                answered = [*tokenizer.encode(answer, control_tokens=False), chat_format.end]
                ids += asked + answered
                labels += [-100] * len(asked) + answered
        return ids, labels

    started = time.perf_counter()
    conversations = read_conversations(file)
    random.Random(SEED).shuffle(conversations)
    packs, pack, filled = [], [], 0
    for conversation in conversations:
        length = len(encode([conversation])[0])
        if filled + length < width:
            pack.append(conversation)
            filled += length
            continue
        if len(encode(pack)[0]) != filled:
            raise RuntimeError("a pack's length is not the sum of its conversations'")
        if pack:
            packs.append(pack)
        pack, filled = ([conversation], length) if length < width else ([], 0)
    writer = FileWriter(output + ".mindrecord", shard_num=1, overwrite=True)
    writer.add_schema({name: {"type": "int32", "shape": [-1]} for name in ("input_ids", "labels")}, "packs")
    rows = []
    for pack in packs:
        ids, labels = encode(pack)
        padding = width - len(ids)
        row = np.array([[chat_format.pad] * padding + ids, [-100] * padding + labels], np.int32)
        writer.write_raw_data([{"input_ids": row[0], "labels": row[1]}])
        rows.append(row)
    writer.commit()
    return {"seconds": time.perf_counter() - started, "packs": _digests(rows)}


def _digests(rows):
    return [hashlib.sha256(row.tobytes()).hexdigest()[:16] for row in rows]


def run(workspace):
    """`Section`."""
    files, tokenizer_file = published_text()
    text = workspace.folder / "conversations.jsonl"
    lines = [line for path in files for line in path.read_bytes().split(b"\n") if line.strip()]
    copies = 1 if workspace.quick else 4
    text.write_bytes(b"\n".join(lines * copies) + b"\n")
    keywords = dict(file=str(text), tokenizer_file=str(tokenizer_file), output=str(workspace.folder / "dataset"))
    results = measure.side_by_side("preprocessing", ["ours", "incumbent"], keywords, workspace.rounds)
    packs = results["ours"][0]["packs"]
    measure.check_equal("packs, but for the last", packs[:-1], results["incumbent"][0]["packs"])
    tokens = results["ours"][0]["tokens"]
    ours, theirs = (measure.median(results[side], "seconds") for side in ("ours", "incumbent"))
    row = Row("preprocessing, a token (official: the incumbent's algorithm)", "µs", 1e6 * ours / tokens,
              1e6 * theirs / tokens, goal_official=1 / 3)
    return Section([row], notes=[
        f"{tokens / ours:,.0f} tokens/s against {tokens / theirs:,.0f}, {theirs / ours:.1f} × as fast: "
        f"{len(lines) * copies:,} conversations, {tokens:,} tokens, {len(packs):,} packs of {MAX_LENGTH + 1} ids, "
        "from JSONL to MindRecord; the libraries were imported before."])
