"""Packing: the incumbent's packs, and the last one that it loses."""

import hashlib

import numpy as np
import pytest

from telechat.data import encoding
from telechat.data.conversation import ChatFormat, read_conversations
from telechat.data.encoding import encode_conversations
from telechat.data.mixture import MixtureFile, read_mixture
from telechat.data.packing import Packing
from telechat.errors import InputError


def conversation(length, value, answer=1):
    """Ids of one conversation; the labels of the last ``answer`` count."""
    input_ids = np.full(length, value, np.int32)
    labels = input_ids.copy()
    labels[:length - answer] = -100
    return input_ids, labels


def rows(packing):
    return [(input_ids.tolist(), labels.tolist()) for input_ids, labels in packing]


def test_packs_equal_the_incumbents(shared, tok_12b):
    golden = np.load(shared / "reference" / "packs_12b.npz")
    mixture = read_mixture([MixtureFile(str(shared / "data" / "multi_turn_example.jsonl"))], 2024)
    chat_format = ChatFormat.for_tokenizer(tok_12b)
    encoded = list(encode_conversations(tok_12b, chat_format, mixture.conversations, workers=1))
    packing = Packing(encoded, mixture.train, 1024, chat_format.pad)
    count = int(golden["count"])
    assert len(packing) == count + 1
    input_ids, labels = map(np.array, zip(*packing))
    assert input_ids.dtype == labels.dtype == np.int32
    np.testing.assert_array_equal(input_ids[:8], golden["first_input_ids"])
    np.testing.assert_array_equal(labels[:8], golden["first_labels"])
    assert hashlib.sha256(input_ids[:count].tobytes()).hexdigest() == str(golden["sha256_input_ids"])
    assert hashlib.sha256(labels[:count].tobytes()).hexdigest() == str(golden["sha256_labels"])

    lengths = [len(encoded[index][0]) for index in mixture.train]
    assert packing.counts["dropped"] == sum(length > 1024 for length in lengths) == 12
    assert packing.counts["conversations"] == 988
    assert packing.counts["tokens"] == sum(length for length in lengths if length <= 1024)
    assert packing.counts["label_tokens"] == np.count_nonzero(labels != -100)
    assert packing.counts["padding_share"] == pytest.approx(np.mean(input_ids == 3), abs=1e-12)
    # The last pack holds the last conversations, and what came before is padding.
    last = np.concatenate([encoded[index][0] for index in mixture.train])
    last = last[-np.count_nonzero(input_ids[-1] != 3):]
    np.testing.assert_array_equal(input_ids[-1][-len(last):], last)


def test_packing_by_hand():
    encoded = [conversation(3, 10), conversation(2, 20), conversation(5, 30, 2), conversation(6, 40)]
    packing = Packing(encoded, [0, 1, 2, 3, 1], max_length=5, pad_id=9)
    # 3 + 2 fit in 5; 5 fits alone; 6 is too long, and ends the pack before it as well.
    assert rows(packing) == [
        ([9, 10, 10, 10, 20, 20], [-100, -100, -100, 10, -100, 20]),
        ([9, 30, 30, 30, 30, 30], [-100, -100, -100, -100, 30, 30]),
        ([9, 9, 9, 9, 20, 20], [-100, -100, -100, -100, -100, 20]),
    ]
    assert packing.counts == {"conversations": 4, "dropped": 1, "truncated": 0, "packs": 3, "tokens": 12,
                              "label_tokens": 5, "padding_share": 1 - 12 / 18}
    assert rows(packing) == rows(packing)


def test_a_dropped_conversation_ends_the_pack():
    encoded = [conversation(1, 10), conversation(9, 20)]
    assert [row[0] for row in rows(Packing(encoded, [0, 1, 0, 1, 1, 0, 0], 4, 9))] == [
        [9, 9, 9, 9, 10], [9, 9, 9, 9, 10], [9, 9, 9, 10, 10]]


def test_truncation_keeps_the_beginning():
    encoded = [conversation(7, 10, 4), conversation(7, 20, 2), conversation(1, 30)]
    packing = Packing(encoded, [0, 1, 2], max_length=5, pad_id=9, overlong="truncate")
    # Of the second nothing that counts would be left, so it is dropped.
    assert rows(packing) == [
        ([9, 10, 10, 10, 10, 10], [-100, -100, -100, -100, 10, 10]),
        ([9, 9, 9, 9, 9, 30], [-100, -100, -100, -100, -100, 30]),
    ]
    assert (packing.counts["truncated"], packing.counts["dropped"], packing.counts["tokens"]) == (1, 1, 6)


def test_bad_settings():
    encoded = [conversation(9, 10)]
    for max_length in (1, 0, -5, 2**20 + 1, 8.0, True):
        with pytest.raises(InputError, match="max_length must be a whole number from 2 to 1048576"):
            Packing(encoded, [0], max_length, 3)
    with pytest.raises(InputError, match='overlong must be "drop" or "truncate", not .keep.'):
        Packing(encoded, [0], 16, 3, "keep")
    with pytest.raises(InputError, match="none of the conversations is short enough for max_length 8"):
        Packing(encoded, [0], 8, 3)


def test_threads_change_nothing(tok, samples, monkeypatch):
    monkeypatch.setattr(encoding, "_CHUNK", 7)
    conversations = read_conversations(samples / "conversations.jsonl")
    chat_format = ChatFormat.for_tokenizer(tok, start_token="<_start>")
    alone = list(encode_conversations(tok, chat_format, conversations, workers=1))
    together = list(encode_conversations(tok, chat_format, conversations, workers=3))
    assert len(alone) == len(together) == len(conversations)
    for one, other in zip(alone, together):
        for left, right in zip(one, other):
            assert left.dtype == right.dtype == np.int32
            np.testing.assert_array_equal(left, right)
    assert alone[0][0][0] == 1


def test_bad_worker_counts(tok):
    for workers in (0, -1, 1.5):
        with pytest.raises(InputError, match="workers must be a whole number of 1 or more"):
            list(encode_conversations(tok, ChatFormat.for_tokenizer(tok), [[("q", "a")]], workers))
