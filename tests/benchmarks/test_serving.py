"""What the comparison of servers makes of streams and of rounds that differ; servers themselves do not run here."""

import dataclasses
import json

import pytest

from benchmarks import serving
from benchmarks.measure import NumbersDiffer


def event(text="", usage=None):
    choices = [{"index": 0, "text": text}] if usage is None else []
    return f"data: {json.dumps({'choices': choices, 'usage': usage})}\n\n".encode()


def test_a_stream_is_read_with_its_times():
    """Events that are cut, several in one part, and one without text."""
    usage = {"prompt_tokens": 7, "completion_tokens": 4}
    one, two = event("你"), event("好")
    parts = [(0.5, one[:20]), (0.7, one[20:]), (1.0, event()), (1.5, two + event("!")),
             (2.0, event(usage=usage) + b"data: [DONE]\n\n")]
    answer = serving._read(parts)
    assert (answer.text, answer.prompt_tokens, answer.tokens, answer.first) == ("你好!", 7, 4, 0.7)
    assert answer.gaps == pytest.approx([0.8, 0.0])
    with pytest.raises(RuntimeError, match="full"):
        serving._read([(0.1, b'data: {"error": "full"}\n\n')])


def rounds(ours="好", theirs="好", speed=1.0):
    """Two answers of ten tokens from each side in a round of five seconds, or ``speed`` times as fast ours."""
    def found(text, factor):
        answers = [serving.Answer(word, 3, 10, 0.2 / factor, [0.1 / factor] * 9) for word in ("x", text)]
        return serving.Round(answers, 5 / factor, 10 ** 9)
    return {"telechat": [found(ours, speed)], "transformers": [found(theirs, 1.0)]}


def test_answers_that_differ_are_counted():
    assert serving.check_same(rounds("好", "好\ufffd"), "transformers") == 0
    assert serving.check_same(rounds("好", "坏"), "transformers") == 1
    twice = rounds()
    twice["transformers"] += rounds(theirs="坏")["transformers"]
    assert serving.check_same(twice, "transformers") == 1
    twice["telechat"] += rounds(ours="坏")["telechat"]
    with pytest.raises(NumbersDiffer, match="answers of two rounds"):
        serving.check_same(twice, "transformers")
    longer = rounds()
    first = longer["telechat"][0].answers
    first[0] = dataclasses.replace(first[0], prompt_tokens=4)
    with pytest.raises(NumbersDiffer, match="tokens of prompts"):
        serving.check_same(longer, "transformers")


def test_goals():
    lines, medians = serving.table(rounds(speed=2.5))
    assert medians["tokens a second"] == {"telechat": 10.0, "transformers": 4.0}
    assert lines[2] == "| tokens a second | tokens/s | 10 | 4 | 2.50 |"
    assert serving.missed(medians, "transformers") == []
    said = serving.missed(serving.table(rounds(speed=0.9))[1], "transformers")
    assert len(said) == 3 and said[0] == "0.90 times the tokens a second of transformers, not 2.0"


def test_requests_are_the_same_every_time():
    requests = serving.make_requests(64, seed=0)
    assert requests == serving.make_requests(64, seed=0) != serving.make_requests(64, seed=1)
    assert all(serving.ANSWERS[0] <= most <= serving.ANSWERS[1] for _, most in requests)
    assert len({text for text, _ in requests}) == 64 and max(len(text) for text, _ in requests) > 300


def test_a_server_that_is_not_built(monkeypatch, capsys):
    monkeypatch.setattr(serving, "LLAMA_SERVER", serving.ROOT / "build" / "nothing")
    with pytest.raises(SystemExit):
        serving.main(["--peer", "llama.cpp"])
    assert "build/nothing is not there; make bench-llama-cpp builds it" in capsys.readouterr().err
