"""Train the demo's SentencePiece vocabulary on the sample conversations.

    python samples/make_tokenizer.py

The result is laid out as the published 12B vocabulary: its control tokens have the same ids and
text is split by the same rules, so the demo goes through the very code that the 12B model does.
The same conversations and sentencepiece give the same file, byte for byte.
"""

import io
import json
import os
import pathlib
import re
import sys

HERE = pathlib.Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import sentencepiece  # noqa: E402

from telechat.cli import ArgumentParser, run  # noqa: E402
from telechat.errors import InputError  # noqa: E402

# In the published 12B's order, which fixes their ids: 4 to 22, behind <_unk>, <_start>, <_end>, <_pad>.
USER_DEFINED_SYMBOLS = [*"0123456789", "_", "\n", "\t", "__", "___", "____", "<_user>", "<_bot>", "<_system>"]


def read_conversations(path):
    """The conversations of a JSONL file: for each, its questions and answers in turn, without markers.

    Raises:
        InputError: the file cannot be read, or a line is not {"input": text, "output": text}.
    """
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8"
        raise InputError(f"{path} cannot be read ({reason}); give a JSONL file of conversations") from None
    conversations = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            texts = [text for text in re.split("<_user>|<_bot>", record["input"]) if text]
            if not isinstance(record["output"], str):
                raise TypeError
            conversations.append([*texts, record["output"]])
        except (ValueError, KeyError, TypeError):
            raise InputError(f'{path}, line {number} must be a JSON object with the texts "input" '
                             'and "output"') from None
    if not conversations:
        raise InputError(f"{path} holds no conversation; add at least one line")
    return conversations


def train(texts, vocab_size):
    """Train a byte-pair vocabulary; returns the content of a ``tokenizer.model``.

    Raises:
        InputError: the texts do not yield ``vocab_size`` pieces.
    """
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(texts),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            character_coverage=1.0,
            byte_fallback=True,
            normalization_rule_name="identity",
            add_dummy_prefix=True,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            split_digits=True,
            unk_id=0, unk_piece="<_unk>",
            bos_id=1, bos_piece="<_start>",
            eos_id=2, eos_piece="<_end>",
            pad_id=3, pad_piece="<_pad>",
            user_defined_symbols=USER_DEFINED_SYMBOLS,
            num_threads=1,  # nothing left to scheduling: the file is compared byte for byte
            minloglevel=2,
        )
    except RuntimeError as error:
        # sentencepiece puts the C++ condition that failed, in brackets, before its sentence.
        reason = str(error).rpartition("] ")[2].strip(" .") or "it must be above 0"
        raise InputError(f"--vocab_size {vocab_size} does not fit the text "
                         f"(sentencepiece: {reason})") from None
    return model.getvalue()


def main():
    parser = ArgumentParser(description="Train the demo's vocabulary on the sample conversations.")
    parser.add_argument("--conversations", type=pathlib.Path, default=HERE / "conversations.jsonl",
                        help="JSONL file to train on")
    parser.add_argument("--output", type=pathlib.Path, default=HERE / "tokenizer.model", help="file to write")
    parser.add_argument("--vocab_size", type=int, default=1664,
                        help="pieces; the default is the largest multiple of 64 at which every merged piece "
                             "occurs at least twice in the shipped text")
    args = parser.parse_args()

    conversations = read_conversations(args.conversations)
    model = train([text for texts in conversations for text in texts], args.vocab_size)
    unfinished = args.output.with_name(f"{args.output.name}.{os.getpid()}.tmp")
    try:
        with open(unfinished, "wb") as file:
            file.write(model)
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, args.output)
    except OSError as error:
        unfinished.unlink(missing_ok=True)
        raise InputError(f"{args.output} cannot be written ({error.strerror}); "
                         "choose another --output") from None

    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    # A conversation is a start token and then, for each text, a marker before it; each answer has an end.
    tokens = sum(1 + sum(1 + len(processor.encode(text)) for text in texts) + len(texts) // 2
                 for texts in conversations)
    print(f"{args.output}: {processor.vocab_size()} pieces, {len(model)} bytes; "
          f"{len(conversations)} conversations are {tokens} tokens")


if __name__ == "__main__":
    run(main)
