"""tools/generate.py where something fails on the way, and its chat on a terminal; one compiled model for all."""

import contextlib
import io
import os
import pty
import re
import select
import subprocess
import sys
import time

import pytest

from telechat import InputError, Tokenizer, chat
from telechat.generation import engine, sampling
from tests.conftest import ROOT, load_tool, save_small_model

QUESTIONS = ["一" * 20, "二", "三", "四", "五", "六", "七", "八"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    directory = tmp_path_factory.mktemp("failing") / "checkpoint"
    save_small_model(directory, training_seqlen=48)
    return directory


@pytest.fixture(scope="module")
def flags(checkpoint):
    path = checkpoint.parent / "questions.jsonl"
    path.write_text("".join(f'{{"input": "{question}"}}\n' for question in QUESTIONS), encoding="utf-8")
    return ["--load_checkpoint", str(checkpoint), "--input_file", str(path), "--independent", "--max_length", "32"]


def run(capsys, flags, *more):
    status = load_tool("generate").main([*flags, *more])
    return status, *capsys.readouterr()


def parts(output):
    """Each question's answer."""
    return dict(part.split("\n", 1) for part in output.split("> ")[1:])


@pytest.fixture(scope="module")
def expected(flags):
    """The answers of a run in which nothing fails; the first has the least room, and is complete first."""
    with contextlib.redirect_stdout(io.StringIO()) as output:
        assert load_tool("generate").main([*flags, "--batch_size", "8"]) == 0
    answers = parts(output.getvalue())
    assert list(answers) == QUESTIONS and len(set(answers.values())) == 8
    return answers


@pytest.mark.parametrize("batch_size", ["8", "1"])
def test_one_answer_that_fails_leaves_seven(flags, expected, capsys, monkeypatch, batch_size):
    choose = sampling.Sampler.__call__

    def failing(sampler, logits, previous_ids):
        if len(previous_ids) == sampler.prompt_length + 3 and previous_ids[:sampler.prompt_length] == failing.prompt:
            raise FloatingPointError("not finite")
        return choose(sampler, logits, previous_ids)

    failing.prompt = chat.parse_prompt(Tokenizer.from_pretrained(flags[1]), "四")
    monkeypatch.setattr(sampling.Sampler, "__call__", failing)
    status, output, errors = run(capsys, flags, "--batch_size", batch_size)
    answers = parts(output)
    assert status == 1 and "error: the answer to '四' failed: not finite\n" in errors
    assert {question: answers[question] for question in QUESTIONS if question != "四"} == {
        question: answer for question, answer in expected.items() if question != "四"}
    assert expected["四"].startswith(answers["四"].rstrip("\n")) and answers["四"] != expected["四"]


@pytest.mark.parametrize("batch_size", ["8", "1"])
def test_a_prompt_that_is_too_long_leaves_the_others(flags, expected, capsys, tmp_path, batch_size):
    path = tmp_path / "questions.jsonl"
    path.write_text("".join(f'{{"input": "{question}"}}\n' for question in ["长" * 40, QUESTIONS[0]]), encoding="utf-8")
    status, output, errors = run(capsys, [*flags[:3], str(path), *flags[4:]], "--batch_size", batch_size)
    assert status == 1 and parts(output)[QUESTIONS[0]].strip() == expected[QUESTIONS[0]].strip()
    assert re.search(r"^error: the answer to '长+' failed: the prompt has \d+ tokens, and max_length 32 leaves no room", errors, re.M)
    path.write_text('{"input": "x"}\n{"input": ""}\n')
    with pytest.raises(InputError, match="questions.jsonl: prompt 2 is empty; leave it out"):
        run(capsys, [*flags[:3], str(path), *flags[4:]])


def test_a_failure_of_the_device_loses_no_answer_that_is_complete(flags, expected, capsys, monkeypatch):
    decode = engine.Engine.decode

    def failing(self, slots, tokens, positions):
        if len(slots) == 7:
            raise MemoryError("the device is full")
        return decode(self, slots, tokens, positions)

    monkeypatch.setattr(engine.Engine, "decode", failing)
    with pytest.raises(MemoryError):
        run(capsys, flags, "--batch_size", "8")
    assert parts(capsys.readouterr().out) == {QUESTIONS[0]: expected[QUESTIONS[0]]}


def test_chat_on_a_terminal_edits_lines_and_survives_halves_of_characters(checkpoint):
    """你 Backspace 好 and an arrow; then half a character; then /exit. A terminal that knows nothing of UTF-8."""
    master, slave = pty.openpty()
    process = subprocess.Popen([sys.executable, str(ROOT / "tools" / "generate.py"), "--load_checkpoint", str(checkpoint),
                                "--max_new_tokens", "3"], stdin=slave, stdout=slave, stderr=slave,
                               env={**os.environ, "LC_ALL": "C.UTF-8", "TERM": "xterm", "GLOG_v": "3"}, start_new_session=True)
    os.close(slave)
    shown = b""

    def wait_for(what):
        nonlocal shown
        end = time.monotonic() + 120
        while what not in shown:
            assert time.monotonic() < end and process.poll() is None, shown
            if select.select([master], [], [], 0.5)[0]:
                shown += os.read(master, 4096)
        before, _, shown = shown.partition(what)
        return before

    try:
        wait_for(b"> ")
        os.write(master, b"\xe4\xbd\xa0\x7f\xe5\xa5\xbd\x1b[D\r")
        echo = wait_for(b"\n> ")
        assert b"^[[D" not in echo and b"error" not in echo
        os.write(master, b"\xe4\xbd\r")
        assert b"error" not in wait_for(b"\n> ")
        os.write(master, b"/exit\r")
        assert process.wait(60) == 0
    finally:
        if process.poll() is None:
            process.kill()
        os.close(master)
