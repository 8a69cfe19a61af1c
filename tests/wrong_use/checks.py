"""How a wrong use is run and judged: one sentence that names what and where, exit status 2, nothing written."""

import importlib.util
import os
import sys

import pytest

from telechat import cli
from tests.conftest import ROOT

FIELDS = dict(vocab_size=1664, hidden_size=32, n_layer=2, n_head=4, ffn_hidden_size=48, training_seqlen=160)


def numbered(uses):
    """Names for pytest, of (tool, arguments, words)."""
    return [f"{number}-{use[0]}" for number, use in enumerate(uses)]


def load(name):
    """The module tools/<name>.py."""
    spec = importlib.util.spec_from_file_location(f"{name}_tool", ROOT / "tools" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def snapshot(folder):
    """Every path below a folder, with sizes and times of its files."""
    return sorted((path, os.stat(path).st_size, os.stat(path).st_mtime_ns) if not os.path.isdir(path) else (path,)
                  for root, names, files in os.walk(folder) for path in (os.path.join(root, name) for name in names + files))


def fill(arguments, places):
    """The arguments with paths for names in braces."""
    return [argument.format(**places) if "{" in argument else argument for argument in arguments]


def assert_one_sentence(status, stderr, words, places):
    """Status 2 and one line "error: …" on stderr that holds each of ``words``."""
    lines = [line for line in stderr.splitlines() if line.startswith("error: ")]
    assert status == 2, (status, stderr)
    assert len(lines) == 1 and "Traceback" not in stderr, stderr
    for word in fill(words, places):
        assert word in lines[0], (word, lines[0])


def check(tool, arguments, words, places, tmp_path, monkeypatch, capsys):
    """Run a tool's main in an empty directory of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [f"tools/{tool}.py"])
    before = snapshot(places["folder"])
    with pytest.raises(SystemExit) as ended:
        cli.run(lambda: load(tool).main(fill(arguments, places)))
    assert_one_sentence(ended.value.code, capsys.readouterr().err, words, places)
    assert snapshot(places["folder"]) == before and os.listdir(tmp_path) == [], "something was written"
