"""Weighted files and the held-out part."""

import json
import random

import pytest

from telechat.data.sources import Source, parse_source, select
from telechat.errors import InputError


def write(path, prefix, count):
    lines = [json.dumps({"input": f"{prefix}{n}", "output": "a"}) + "\n" for n in range(count)]
    path.write_text("".join(lines))
    return str(path)


def questions(selection, indices):
    return [selection.conversations[index][0][0] for index in indices]


def test_flags(tmp_path):
    here = write(tmp_path / "a.jsonl", "a", 1)
    colon = write(tmp_path / "b:2", "b", 1)
    assert parse_source(here) == Source(here, 1.0)
    assert parse_source(here + ":0.25") == Source(here, 0.25)
    assert parse_source(colon) == Source(colon, 1.0)  # a file of exactly that name
    assert parse_source(colon + ":3") == Source(colon, 3.0)
    assert parse_source("missing.jsonl:2") == Source("missing.jsonl", 2.0)
    assert parse_source("C:missing.jsonl") == Source("C:missing.jsonl", 1.0)
    for weight in ("0", "-1", "nan", "inf", "1001"):
        with pytest.raises(InputError, match="a.jsonl: the weight must be above 0 and at most 1000"):
            parse_source(f"{here}:{weight}")
    with pytest.raises(InputError, match="a.jsonl:twice: the weight behind the colon must be a number"):
        parse_source(here + ":twice")


def test_one_file_is_shuffled_as_the_incumbent_does(tmp_path):
    source = Source(write(tmp_path / "a.jsonl", "a", 50))
    expected = list(range(50))
    random.seed(2024)
    random.shuffle(expected)
    assert select([source], 2024).train == expected
    assert select([source], 2025).train != expected


def test_weights(tmp_path):
    a, b = write(tmp_path / "a.jsonl", "a", 10), write(tmp_path / "b.jsonl", "b", 20)
    selection = select([Source(a, 2.5), Source(b, 0.25)], 7)
    counts = {question: questions(selection, selection.train).count(question)
              for question in questions(selection, range(30))}
    assert sorted(counts[f"a{n}"] for n in range(10)) == [2] * 5 + [3] * 5
    assert sorted(counts[f"b{n}"] for n in range(20)) == [0] * 15 + [1] * 5
    assert select([Source(a, 2.5), Source(b, 0.25)], 7) == selection
    other = select([Source(a, 2.5), Source(b, 0.25)], 8)
    assert sorted(other.train) != sorted(selection.train)  # another seed, other halves


def test_held_out_conversations_are_not_trained_on(tmp_path):
    a, b = write(tmp_path / "a.jsonl", "a", 30), write(tmp_path / "b.jsonl", "b", 20)
    selection = select([Source(a, 3), Source(b)], 7, eval_share=0.1)
    assert len(selection.evaluation) == len(set(selection.evaluation)) == 5
    assert not set(selection.evaluation) & set(selection.train)
    assert set(selection.evaluation) | set(selection.train) == set(range(50))
    assert selection.evaluation == select([Source(a), Source(b)], 7, eval_share=0.1).evaluation
    assert selection.evaluation != select([Source(a, 3), Source(b)], 8, eval_share=0.1).evaluation
    assert len(select([Source(a)], 7, eval_share=0.001).evaluation) == 1


def test_nothing_left(tmp_path):
    one = write(tmp_path / "one.jsonl", "a", 1)
    for arguments in (([Source(one, 0.2)], 7), ([Source(one)], 7, 0.5)):
        with pytest.raises(InputError, match="no conversation is left to train on"):
            select(*arguments)
    for share in (-0.1, 1, 1.5, float("nan")):
        with pytest.raises(InputError, match="eval_share must be at least 0 and below 1"):
            select([Source(one)], 7, share)
