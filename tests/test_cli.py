"""What all tools share: how they end, and what a path in a flag is."""

import argparse
import io
import os
import signal
import subprocess
import sys

import pytest

from telechat import InputError, cli
from telechat.data.mixture import parse_mixture_file
from tests.conftest import ROOT, load_tool


@pytest.fixture
def failed(monkeypatch, capsys):
    """failed() → exit status, stderr of a tool with an unexpected failure."""
    monkeypatch.setattr(sys, "argv", ["tools/train.py", "--config", "x"])

    def main():
        raise RuntimeError("the first line\nand more")

    def call():
        with pytest.raises(SystemExit) as ended:
            cli.run(main)
        return ended.value.code, capsys.readouterr().err

    return call


@pytest.mark.parametrize("named", [False, True], ids=["temporary", "named"])
def test_an_unexpected_failure_is_one_line_and_a_file(named, failed, monkeypatch, tmp_path):
    folders = {name: tmp_path / name for name in ("temporary", "named")}
    for folder in folders.values():
        folder.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(folders["temporary"]))
    monkeypatch.delenv(cli.TRACEBACK_FOLDER, raising=False)
    if named:  # as tools/launch.py does
        monkeypatch.setenv(cli.TRACEBACK_FOLDER, str(folders["named"]))
    status, error = failed()
    saved, = tmp_path.glob("*/*")
    assert saved.parent == folders["named" if named else "temporary"]
    assert status == 1 and error == f"error: unexpected RuntimeError: the first line (details: {saved})\n"
    text = saved.read_text()
    assert text.startswith("tools/train.py --config x\n") and "Traceback" in text and "and more" in text


def test_a_traceback_that_cannot_be_saved_is_printed(failed, monkeypatch, tmp_path):
    monkeypatch.setenv(cli.TRACEBACK_FOLDER, str(tmp_path / "absent"))
    status, error = failed()
    *traceback, line = error.splitlines()
    assert status == 1
    assert line == "error: unexpected RuntimeError: the first line (details: above; no file can be written)"
    assert traceback[0].startswith("Traceback") and traceback[-1] == "and more"


@pytest.mark.parametrize("status, made", [(None, ["finished.3"]), (0, ["finished.3"]), (1, [])])
def test_a_process_says_that_it_has_finished(monkeypatch, tmp_path, status, made):
    """As `tools/launch.py` asks it to; nothing is said where the work failed."""
    monkeypatch.setenv(cli.FINISHED, str(tmp_path / "finished"))
    monkeypatch.setenv("RANK_ID", "3")
    with pytest.raises(SystemExit) as ended:
        cli.run(lambda: status)
    assert ended.value.code == (status or 0)
    assert [path.name for path in tmp_path.iterdir()] == made


def test_characters_that_an_encoding_lacks_are_replaced(monkeypatch):
    """Typed halves of a character and a terminal or pipe without Chinese, whatever the tool."""
    typed = io.TextIOWrapper(io.BytesIO(b"\xe4\xbd ok\n"), encoding="utf-8")
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, io.TextIOWrapper(io.BytesIO(), encoding="ascii", errors="strict"))
    monkeypatch.setattr(sys, "stdin", typed)
    output, errors = sys.stdout.buffer, sys.stderr.buffer

    def main():
        print(f"你好 \ud800 {sys.stdin.readline().strip()}", flush=True)
        raise InputError("没有 file")

    with pytest.raises(SystemExit) as ended:
        cli.run(main)
    sys.stderr.flush()
    assert ended.value.code == 2
    assert (output.getvalue(), errors.getvalue()) == (b"?? ? ? ok\n", b"error: ?? file\n")


HALF_WRITTEN = """
import os, signal, sys, time
from telechat import cli
from telechat.checkpoint.atomic_replacement import replace_atomically
def main():
    with replace_atomically(sys.argv[1], lambda name: True) as writing:
        open(os.path.join(writing, "half"), "w").close()
        os.kill(os.getpid(), getattr(signal, sys.argv[2]))
        time.sleep(20)
cli.run(main)
"""
IMPORTING = """
import sys
from telechat import cli
class Finder:
    def find_spec(self, name, *_):
        if name == "mindspore.nn.metrics":
            raise KeyboardInterrupt
sys.meta_path.insert(0, Finder())
cli.run(lambda: __import__("mindspore"))
"""


@pytest.mark.parametrize("name, status", [("SIGINT", 130), ("SIGTERM", 143), ("SIGHUP", 129)])
def test_signals_leave_nothing_half_written(tmp_path, name, status):
    result = subprocess.run([sys.executable, "-c", HALF_WRITTEN, tmp_path / "out", name], cwd=ROOT, capture_output=True,
                            text=True, timeout=60)
    assert (result.returncode, result.stderr, os.listdir(tmp_path)) == (status, "interrupted\n", [])


def test_a_job_s_processes_end_at_once_as_the_system_has_it(tmp_path):
    result = subprocess.run([sys.executable, "-c", HALF_WRITTEN, tmp_path / "out", "SIGTERM"], cwd=ROOT, capture_output=True,
                            timeout=60, env={**os.environ, "MS_ROLE": "MS_WORKER"})
    assert (result.returncode, result.stderr) == (-signal.SIGTERM, b"")


def test_ctrl_c_while_mindspore_is_imported_is_one_word():
    result = subprocess.run([sys.executable, "-c", IMPORTING], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (result.returncode, result.stdout, result.stderr) == (130, "", "interrupted\n")


def test_ctrl_c_behind_another_exception(capsys):
    def main():
        raise ImportError("initialization failed") from KeyboardInterrupt()

    with pytest.raises(SystemExit) as ended:
        cli.run(main)
    assert (ended.value.code, capsys.readouterr().err) == (130, "interrupted\n")


@pytest.fixture
def unread(tmp_path):
    """unread(code) → exit status and stderr of Python code whose output goes to a pipe that nobody reads."""
    def call(code):
        reading, writing = os.pipe()
        os.close(reading)
        result = subprocess.run([sys.executable, "-c", code], stdout=writing, stderr=subprocess.PIPE, text=True, cwd=ROOT,
                                env={**os.environ, "TMPDIR": str(tmp_path), "PYTHONUNBUFFERED": ""})
        os.close(writing)
        return result.returncode, result.stderr
    return call


@pytest.mark.parametrize("main", [
    "lambda: print('x' * 100000)",  # more than Python keeps back
    "lambda: print('x')",  # kept back until the end
    "lambda: print('x') or 0",
    "lambda: cli.ArgumentParser().parse_args(['--help'])",
])
def test_a_tool_whose_reader_has_gone_ends_quietly(unread, tmp_path, main):
    """As with ``| head``."""
    assert unread(f"from telechat import cli; cli.run({main})") == (0, "")
    assert os.listdir(tmp_path) == []


def test_a_refusal_is_told_where_nobody_reads_the_output(unread):
    code = "import sys\nfrom telechat import cli, errors\ndef main():\n sys.stdout.write('x')\n raise errors.InputError('no')\n"
    assert unread(code + "cli.run(main)") == (2, "error: no\n")


@pytest.mark.parametrize("given, meant", [
    ("~/x", "{home}/x"), ("$HOME/x", "{home}/x"), ("${HOME}/x y", "{home}/x y"), ("a/~/x", "a/~/x"), ("x$", "x$"),
    ("$NOT_SET_HERE/x", "$NOT_SET_HERE/x"), ("50%#a?b", "50%#a?b"), ("{here}/$HOME", "{here}/$HOME"),
])
def test_paths_in_flags_mean_what_they_mean_to_a_shell(tmp_path, monkeypatch, given, meant):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("NOT_SET_HERE", raising=False)
    (tmp_path / "$HOME").mkdir()  # what exists as it is written is meant
    places = {"home": tmp_path / "home", "here": tmp_path}
    given = given if given.startswith("$") else given.format(**places)
    assert cli.path_argument(given) == meant.format(**places)


def test_a_path_that_is_not_utf_8_is_refused(capsys, monkeypatch, tmp_path):
    """As of a folder that was named on a system in GBK: MindSpore and torch cannot take one."""
    parser = cli.ArgumentParser(prog="x.py")
    parser.add_argument("--to", type=cli.path_argument)
    said = "is not UTF-8 throughout; rename the folder or file"
    with pytest.raises(SystemExit, match="2"):
        parser.parse_args(["--to", os.fsdecode(b"a/\xc4\xe3")])
    assert capsys.readouterr().err == f"error: argument --to: the path a/?? {said}; x.py --help lists the flags\n"
    with pytest.raises(InputError, match=said):
        parse_mixture_file(os.fsdecode(b"\xc4\xe3.jsonl:2"))
    os.mkdir(folder := os.path.join(os.fsencode(tmp_path), b"\xc4"))
    monkeypatch.chdir(folder)
    with pytest.raises(SystemExit, match="2"):
        parser.parse_args(["--to", "out"])  # it lies in one
    os.rmdir(folder)
    assert parser.parse_args(["--to", "out"]).to == "out"


@pytest.mark.parametrize("tool, flags", [
    ("train", {"config", "train_dataset", "load_checkpoint", "output_dir", "resume_from"}),
    ("preprocess", {"output_path", "vocab_file_path"}), ("evaluate", {"load_checkpoint", "data", "output_dir"}),
    ("generate", {"load_checkpoint", "input_file"}), ("inspect", {"directory", "tokenizer"}), ("serve", {"load_checkpoint"}),
    ("estimate", {"config", "load_checkpoint", "model_config"}), ("launch", {"log_dir", "script"}),
])
def test_every_flag_with_a_path_is_one(monkeypatch, tool, flags):
    """What argparse knows of the tools' flags; a path that is read as plain text would keep its ~."""
    found = set()
    original = argparse._ActionsContainer.add_argument

    def note(self, *names, **options):
        action = original(self, *names, **options)
        if options.get("type") is cli.path_argument:
            found.add(action.dest)
        return action

    monkeypatch.setattr(argparse._ActionsContainer, "add_argument", note)
    with pytest.raises(SystemExit):
        load_tool(tool).main(["--help"])
    assert found >= flags
