"""What every measurement starts from: sizes of models, their random weights, and batches of published text."""

import dataclasses
import json
import pathlib

from benchmarks.measure import ROOT, run_child

SIZES = {
    "S": dict(hidden_size=512, n_head=8, n_layer=8, ffn_hidden_size=1376, vocab_size=8000),
    "M": dict(hidden_size=1024, n_head=16, n_layer=8, ffn_hidden_size=2752, vocab_size=16000),
    # TeleChat-1B's shape.
    "L": dict(hidden_size=2048, n_head=32, n_layer=16, ffn_hidden_size=5460, vocab_size=120000),
}
GROUP = 128  # inputs that share a scale in a quantised checkpoint
SHARED = ROOT.parent / "shared" / "data"


@dataclasses.dataclass(frozen=True)
class Workspace:
    """A folder for weights and batches, and how thoroughly to measure.

    Attributes:
        folder (Path): where they are written, each once.
        quick (bool): small sizes and few repeats, to see that everything works.
        rounds (int): how often each side is started.
    """

    folder: pathlib.Path
    quick: bool = False
    rounds: int = 3

    def weights(self, size, layers=None, dropout=0.0):
        """A checkpoint directory with random weights: the size's, or with other layers or dropout everywhere."""
        fields = dict(SIZES[size], n_layer=layers or SIZES[size]["n_layer"], attention_dropout=dropout,
                      hidden_dropout=dropout, embedding_dropout=dropout)
        directory = self.folder / f"{size}-{fields['n_layer']}-{dropout}"
        if not directory.is_dir():
            run_child("workspace", "write_weights", dict(fields=fields, directory=str(directory)))
        return str(directory)

    def quantised(self, size, bits):
        """The size's checkpoint with products of ``bits`` bits, as tools/quantize.py rounds them to the nearest."""
        directory = self.folder / f"{size}-int{bits}"
        if not directory.is_dir():
            run_child("workspace", "write_quantised", dict(weights=self.weights(size), bits=bits, directory=str(directory)))
        return str(directory)

    def batches(self, size, rows, length, count):
        """A file of ``count`` batches (rows, length + 1) with the size's vocabulary, and the share that counts."""
        file = self.folder / f"batches-{size}-{rows}-{length}-{count}.npz"
        share = file.with_suffix(".json")
        if not share.exists():
            figures = run_child("workspace", "write_batches", dict(
                rows=rows, length=length, count=count, vocabulary=SIZES[size]["vocab_size"], file=str(file)))
            share.write_text(json.dumps(figures["share"]))
        return str(file), json.loads(share.read_text())


def published_text():
    """Conversation files and the tokenizer: the published ones, or the project's samples where those are absent."""
    if SHARED.is_dir():
        return [SHARED / "multi_turn_example.jsonl", SHARED / "single_turn_example.jsonl"], \
            SHARED / "telechat_12b.tokenizer.model"
    return [ROOT / "samples" / "conversations.jsonl"], ROOT / "samples" / "tokenizer.model"


def config_of(directory):
    """The config of a checkpoint directory; MindSpore is not imported."""
    from telechat.config import TeleChatConfig

    return TeleChatConfig.from_pretrained(directory)


def read_batches(file):
    """[(input_ids, labels), …] as `Workspace.batches` wrote them; int32 (rows, length + 1) each."""
    import numpy as np

    with np.load(file) as arrays:
        return list(zip(arrays["input_ids"], arrays["labels"]))


def prompts(size, rows, length):
    """``rows`` prompts of ``length`` random token ids."""
    import numpy as np

    shape = (rows, length)
    return np.random.default_rng(0).integers(4, SIZES[size]["vocab_size"], shape).tolist()


def weight_bytes(size, read_in_decoding=False, width=4):
    """Bytes of a model's weights of ``width`` bytes; ``read_in_decoding``: those read for a token, so not the embedding."""
    from telechat.checkpoint.layout import parameter_shapes
    from telechat.config import TeleChatConfig

    total = 0
    for name, shape in parameter_shapes(TeleChatConfig(**SIZES[size])).items():
        if not (read_in_decoding and "word_embeddings" in name):
            total += width * shape[0] * (shape[1] if len(shape) > 1 else 1)
    return total


def write_weights(fields, directory):
    """In a child: a checkpoint directory with the library's random weights."""
    import functools

    from telechat.checkpoint.layout import parameter_shapes
    from telechat.checkpoint.writer import write_checkpoint
    from telechat.config import TeleChatConfig
    from telechat.model import initial_tensor

    config = TeleChatConfig(**fields)
    draw = functools.partial(initial_tensor, config, 0)
    write_checkpoint(directory, config, ((name, draw(name, shape)) for name, shape in parameter_shapes(config).items()))
    return {}


def write_quantised(weights, bits, directory):
    """In a child: the products of a checkpoint rounded to the nearest of ``bits`` bits, GROUP inputs a scale."""
    from telechat.quantization.quantise import quantise

    quantise(weights, directory, bits, GROUP, say=lambda line: None, pad_ffn=True)
    return {}


def write_batches(rows, length, count, vocabulary, file):
    """In a child: packs of the published text in training order, as tools/preprocess.py makes them.

    A small vocabulary stands in for the tokenizer's: ids are taken modulo its size, and which of them count stays.
    """
    import numpy as np

    from telechat.data import ChatFormat, MixtureFile, Packing, Tokenizer, encode_conversations, read_mixture

    files, tokenizer_file = published_text()
    tokenizer = Tokenizer.from_pretrained(str(tokenizer_file))
    chat_format = ChatFormat.for_tokenizer(tokenizer)
    mixture = read_mixture([MixtureFile(str(path)) for path in files], seed=2024)
    encoded = list(encode_conversations(tokenizer, chat_format, mixture.conversations, workers=1))
    packs = []
    while len(packs) < rows * count:  # over and over, where there is little text
        packs += list(Packing(encoded, mixture.train, length, chat_format.pad))
    input_ids, labels = (np.stack(column[:rows * count]) for column in zip(*packs))
    input_ids, labels = input_ids % vocabulary, np.where(labels < 0, labels, labels % vocabulary)
    shape = (count, rows, length + 1)
    np.savez(file, input_ids=input_ids.reshape(shape), labels=labels.reshape(shape))
    return {"share": float((labels[:, 1:] >= 0).mean())}
