"""Weighted files and the held-out part."""

import json
import random

import pytest

from telechat.data.mixture import MixtureFile, parse_mixture_file, read_mixture
from telechat.errors import InputError


def write(path, prefix, count):
    lines = [json.dumps({"input": f"{prefix}{n}", "output": "a"}) + "\n" for n in range(count)]
    path.write_text("".join(lines))
    return str(path)


def questions(mixture, indices):
    return [mixture.conversations[index][0][0] for index in indices]


def test_flags(tmp_path):
    here = write(tmp_path / "a.jsonl", "a", 1)
    colon = write(tmp_path / "b:2", "b", 1)
    assert parse_mixture_file(here) == MixtureFile(here, 1.0)
    assert parse_mixture_file(here + ":0.25") == MixtureFile(here, 0.25)
    assert parse_mixture_file(colon) == MixtureFile(colon, 1.0)  # a file of exactly that name
    assert parse_mixture_file(colon + ":3") == MixtureFile(colon, 3.0)
    assert parse_mixture_file("missing.jsonl:2") == MixtureFile("missing.jsonl", 2.0)
    assert parse_mixture_file("C:missing.jsonl") == MixtureFile("C:missing.jsonl", 1.0)
    for weight in ("0", "-1", "nan", "inf", "1001"):
        with pytest.raises(InputError, match="a.jsonl: the weight must be above 0 and at most 1000"):
            parse_mixture_file(f"{here}:{weight}")
    with pytest.raises(InputError, match="a.jsonl:twice: the weight behind the colon must be a number"):
        parse_mixture_file(here + ":twice")


def test_one_file_is_shuffled_as_the_incumbent_does(tmp_path):
    source = MixtureFile(write(tmp_path / "a.jsonl", "a", 50))
    expected = list(range(50))
    random.seed(2024)
    random.shuffle(expected)
    assert read_mixture([source], 2024).train == expected
    assert read_mixture([source], 2025).train != expected


def test_weights(tmp_path):
    a, b = write(tmp_path / "a.jsonl", "a", 10), write(tmp_path / "b.jsonl", "b", 20)
    mixture = read_mixture([MixtureFile(a, 2.5), MixtureFile(b, 0.25)], 7)
    counts = {question: questions(mixture, mixture.train).count(question)
              for question in questions(mixture, range(30))}
    assert sorted(counts[f"a{n}"] for n in range(10)) == [2] * 5 + [3] * 5
    assert sorted(counts[f"b{n}"] for n in range(20)) == [0] * 15 + [1] * 5
    assert read_mixture([MixtureFile(a, 2.5), MixtureFile(b, 0.25)], 7) == mixture
    other = read_mixture([MixtureFile(a, 2.5), MixtureFile(b, 0.25)], 8)
    assert sorted(other.train) != sorted(mixture.train)  # another seed, other halves


def test_held_out_conversations_are_not_trained_on(tmp_path):
    a, b = write(tmp_path / "a.jsonl", "a", 30), write(tmp_path / "b.jsonl", "b", 20)
    mixture = read_mixture([MixtureFile(a, 3), MixtureFile(b)], 7, eval_share=0.1)
    assert len(mixture.evaluation) == len(set(mixture.evaluation)) == 5
    assert not set(mixture.evaluation) & set(mixture.train)
    assert set(mixture.evaluation) | set(mixture.train) == set(range(50))
    assert mixture.evaluation == read_mixture([MixtureFile(a), MixtureFile(b)], 7, eval_share=0.1).evaluation
    assert mixture.evaluation != read_mixture([MixtureFile(a, 3), MixtureFile(b)], 8, eval_share=0.1).evaluation
    assert len(read_mixture([MixtureFile(a)], 7, eval_share=0.001).evaluation) == 1


def test_nothing_left(tmp_path):
    one = write(tmp_path / "one.jsonl", "a", 1)
    for arguments in (([MixtureFile(one, 0.2)], 7), ([MixtureFile(one)], 7, 0.5)):
        with pytest.raises(InputError, match="no conversation is left to train on"):
            read_mixture(*arguments)
    for share in (-0.1, 1, 1.5, float("nan")):
        with pytest.raises(InputError, match="eval_share must be at least 0 and below 1"):
            read_mixture([MixtureFile(one)], 7, share)
