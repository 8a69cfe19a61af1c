"""When something long is shown, where, and what is said of it."""

import os
import pty
import select
import subprocess
import sys
import time

import pytest

from telechat import progress
from telechat.progress import Progress, duration, track
from tests.conftest import ROOT


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(progress, "INTERVAL", 0.2)


def lines(capsys):
    said = capsys.readouterr()
    assert said.out == ""
    return said.err.splitlines()


@pytest.mark.parametrize("seconds, text", [(0, "0:00"), (59.6, "1:00"), (3599, "59:59"), (3600, "1:00:00"), (-5, "0:00")])
def test_durations(seconds, text):
    assert duration(seconds) == text


def test_a_line_tells_what_how_far_and_how_long():
    with Progress("loading weights", 1200, "tensors") as shown:
        shown.advance(7)
        shown.advance()
        assert shown.line(61) == "progress: loading weights, 8 of 1,200 tensors, 1:01"
    assert Progress("compiling").line(5) == "progress: compiling, 0:05"


def test_what_is_over_soon_is_not_shown(capsys):
    assert list(track(range(3), "counting", "numbers")) == [0, 1, 2]
    assert lines(capsys) == []


def test_a_line_comes_again_and_again_though_nothing_is_done(quick, capsys):
    with Progress("compiling"):
        time.sleep(0.75)
    said = lines(capsys)
    assert len(said) >= 2 and set(said) <= {"progress: compiling, 0:00", "progress: compiling, 0:01"}


def test_only_the_innermost_is_shown(quick, capsys):
    with Progress("training"):
        with Progress("saving"):
            time.sleep(0.3)
        time.sleep(0.3)
    said = [line.split(",")[0] for line in lines(capsys)]
    assert said[0] == "progress: saving" and "progress: training" in said


def test_it_ends_with_what_it_shows(quick, capsys):
    with pytest.raises(KeyError):
        for _ in track([1, 2], "counting", "numbers"):
            raise KeyError
    time.sleep(0.3)
    assert lines(capsys) == []


def test_a_terminal_gets_a_bar_that_is_gone_at_the_end():
    script = ("from telechat import progress\nprogress.PATIENCE, progress.INTERVAL = 0.05, 1\n"
              "with progress.Progress('counting', 4, 'numbers') as shown:\n"
              "    shown.advance(3)\n    input()\n")
    ours, theirs = pty.openpty()
    process = subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stderr=theirs, cwd=ROOT)
    said = ""
    while "3/4" not in said and select.select([ours], [], [], 60)[0]:
        said += os.read(ours, 1 << 16).decode()
    process.communicate(b"\n", timeout=60)
    while select.select([ours], [], [], 0)[0]:
        said += os.read(ours, 1 << 16).decode()
    os.close(ours)
    os.close(theirs)
    assert "counting:  75%" in said and "\n" not in said
    assert said.endswith("\r") and said.split("\r")[-2].strip() == "", "wiped out"
