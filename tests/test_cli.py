"""How the tools end at a failure that is not the user's."""

import io
import sys

import pytest

from telechat import InputError, cli


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
