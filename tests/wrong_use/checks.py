"""How a wrong use is run and judged: one sentence that names what and where, exit status 2, nothing written."""

import os
import pathlib
import re
import shlex
import sys

import pytest

from telechat import cli
from tests.conftest import assert_one_sentence, load_tool

FIELDS = dict(vocab_size=1664, hidden_size=32, n_layer=2, n_head=4, ffn_hidden_size=48, training_seqlen=160)


def snapshot(folder):
    """Every path below a folder, with sizes and times of its files."""
    return sorted((path, os.stat(path).st_size, os.stat(path).st_mtime_ns) if not os.path.isdir(path) else (path,)
                  for root, names, files in os.walk(folder) for path in (os.path.join(root, name) for name in names + files))


def fill(arguments, places):
    """The arguments with paths for names in braces."""
    return [argument.format(**places) if "{" in argument else argument for argument in arguments]


def command(tool, arguments):
    """How a wrong use is called in reasons.txt."""
    words = shlex.join([tool, *arguments])
    return words if len(words) <= 300 else words[:300] + "…"


def read_reasons():
    """Wrong use → the whole sentence, from reasons.txt."""
    lines = (pathlib.Path(__file__).parent / "reasons.txt").read_text(encoding="utf-8").splitlines()
    lines = [line for line in lines if line and not line.startswith("#")]
    return {use: reason.strip() for use, reason in zip(lines[::2], lines[1::2], strict=True)}


def assert_reason(stderr, reason, places):
    """The line "error: …" is the whole sentence ``reason``, in which … stands for anything."""
    said = next(line for line in stderr.splitlines() if line.startswith("error: "))
    pattern = ".*".join(map(re.escape, f"error: {reason}".format(**places).split("…")))
    assert re.fullmatch(pattern, said), (reason, said)


REASONS = read_reasons()


def check(tool, arguments, words, places, tmp_path, monkeypatch, capsys):
    """Run a tool's main in an empty directory of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [f"tools/{tool}.py"])
    before = snapshot(places["folder"])
    with pytest.raises(SystemExit) as ended:
        cli.run(lambda: load_tool(tool).main(fill(arguments, places)))
    stderr = capsys.readouterr().err
    assert_one_sentence(ended.value.code, stderr, fill(words, places))
    assert_reason(stderr, REASONS[command(tool, arguments)], places)
    assert snapshot(places["folder"]) == before and os.listdir(tmp_path) == [], "something was written"
