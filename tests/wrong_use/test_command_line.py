"""Every wrong use of a tool through its main(), some through the real command line; and how many there are."""

import os
import subprocess
import sys

import pytest

from tests.conftest import ROOT, assert_one_sentence
from tests.wrong_use import answering, preparing, test_requests, training
from tests.wrong_use.checks import REASONS, check, command, fill, snapshot

# (tool, arguments, words of the sentence); names in braces stand for the `places` of conftest.py.
USES = [*preparing.USES, *training.USES, *answering.USES]


def numbered(uses):
    """Names for pytest."""
    return [f"{number}-{use[0]}" for number, use in enumerate(uses)]


def test_there_are_two_hundred_wrong_uses_and_some_of_every_tool():
    assert len(USES) + len(test_requests.REQUESTS) >= 200
    assert {tool for tool, _, _ in USES} == {path.stem for path in (ROOT / "tools").glob("*.py")}


def test_the_reasons_are_those_of_the_uses():
    assert {command(tool, arguments) for tool, arguments, _ in USES} == set(REASONS)


@pytest.mark.parametrize("tool, arguments, words", USES, ids=numbered(USES))
def test_wrong_uses(tool, arguments, words, places, tmp_path, monkeypatch, capsys):
    check(tool, arguments, words, places, tmp_path, monkeypatch, capsys)


# The real command line: the first wrong flag and the first wrong file of each tool.
REAL = [next(use for use in USES if use[0] == tool and ("{absent}" in use[1]) == missing)
        for tool in dict.fromkeys(tool for tool, _, _ in USES) for missing in (False, True)
        if any(use[0] == tool and ("{absent}" in use[1]) == missing for use in USES)]


@pytest.mark.parametrize("tool, arguments, words", REAL, ids=numbered(REAL))
def test_through_the_real_command_line(tool, arguments, words, places, tmp_path):
    before = snapshot(places["folder"])
    result = subprocess.run([sys.executable, str(ROOT / "tools" / f"{tool}.py"), *fill(arguments, places)], cwd=tmp_path,
                            capture_output=True, text=True, timeout=120)
    assert_one_sentence(result.returncode, result.stderr, fill(words, places))
    assert snapshot(places["folder"]) == before and os.listdir(tmp_path) == []
