"""Fixtures that every test may use."""

import dataclasses
import pathlib
import subprocess
import sys

import numpy as np
import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared"
SIZES = ("7b", "12b", "52b")


@pytest.fixture(scope="session")
def shared():
    """The folder of reference material beside the project; the test is skipped where it is absent."""
    if not SHARED.is_dir():
        pytest.skip("needs the reference material in ../shared, which is not here")
    return SHARED


@dataclasses.dataclass(frozen=True)
class Reference:
    """A tiny official checkpoint, the same converted to ours, and what the official code computes."""

    official: pathlib.Path
    directory: pathlib.Path
    golden: dict

    def model(self, dtype="float32"):
        from telechat import TeleChat

        return TeleChat.from_pretrained(self.directory, dtype)


@pytest.fixture(scope="session", params=SIZES)
def reference(request, shared, tmp_path_factory):
    """A `Reference` of each model size in turn."""
    from telechat.checkpoint.convert import torch_to_ms

    official = shared / "reference" / f"telechat_{request.param}_tiny"
    directory = tmp_path_factory.mktemp(f"tiny_{request.param}") / "checkpoint"
    torch_to_ms(str(official), str(directory))
    return Reference(official, directory, dict(np.load(official / "golden.npz")))


@pytest.fixture
def tool(tmp_path):
    """tool("train.py", "--flag", …) runs a command-line tool in an empty directory of its own."""
    def call(name, *arguments, stdin="", timeout=300):
        folder = tmp_path / "work"
        folder.mkdir(exist_ok=True)
        return subprocess.run([sys.executable, str(ROOT / "tools" / name), *map(str, arguments)], input=stdin,
                              capture_output=True, text=True, timeout=timeout, cwd=folder, encoding="utf-8")
    return call


def assert_refused(result, *words):
    """A tool ended with status 2 and one sentence that holds ``words``, and no traceback."""
    lines = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert result.returncode == 2, result.stderr
    assert "Traceback" not in result.stderr
    assert len(lines) == 1, result.stderr
    for word in words:
        assert str(word) in lines[0], (word, lines[0])
