"""The real command line refuses as main() does; and how many wrong uses there are."""

import os
import subprocess
import sys

import pytest

from tests.conftest import ROOT
from tests.wrong_use import test_answering, test_preparing, test_requests, test_training
from tests.wrong_use.checks import assert_one_sentence, fill, numbered, snapshot

USES = [*test_preparing.USES, *test_training.USES, *test_answering.USES]


def test_there_are_two_hundred_wrong_uses_and_some_of_every_tool():
    assert len(USES) + len(test_requests.REQUESTS) >= 200
    assert {tool for tool, _, _ in USES} == {path.stem for path in (ROOT / "tools").glob("*.py")}


# The real command line: the first wrong flag and the first wrong file of each tool.
REAL = [next(use for use in USES if use[0] == tool and ("{absent}" in use[1]) == missing)
        for tool in dict.fromkeys(tool for tool, _, _ in USES) for missing in (False, True)
        if any(use[0] == tool and ("{absent}" in use[1]) == missing for use in USES)]


@pytest.mark.parametrize("tool, arguments, words", REAL, ids=numbered(REAL))
def test_through_the_real_command_line(tool, arguments, words, places, tmp_path):
    before = snapshot(places["folder"])
    result = subprocess.run([sys.executable, str(ROOT / "tools" / f"{tool}.py"), *fill(arguments, places)], cwd=tmp_path,
                            capture_output=True, text=True, timeout=120)
    assert_one_sentence(result.returncode, result.stderr, words, places)
    assert snapshot(places["folder"]) == before and os.listdir(tmp_path) == []
