"""Fixtures that every test may use."""

import dataclasses
import importlib.util
import pathlib
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest

# Under nohup a process keeps SIGHUP without effect, and so would those that tests start to see its effect.
signal.signal(signal.SIGHUP, signal.SIG_DFL)

ROOT = pathlib.Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared"
MODELS = ("telechat_7b", "telechat_12b", "telechat_52b", "telechat2", "telechat2_mha", "telechat3")


def pytest_addoption(parser):
    parser.addoption("--portable", action="store_true", help="models that this process makes have no operators for CPUs")
    parser.addoption("--soak_minutes", type=float, default=30, help="how long the server's soak takes")


@pytest.fixture(autouse=True, scope="session")
def portable_kernels(request):
    """With --portable the choice of kernels is what it is where there is no C++ compiler."""
    if request.config.getoption("--portable"):
        from telechat.nn import kernel_choice

        kernel_choice.cpu_obstacle = lambda dtype: "the tests were given --portable"


@pytest.fixture(scope="session")
def shared():
    """The folder of reference material beside the project; the test is skipped where it is absent."""
    if not SHARED.is_dir():
        pytest.skip("needs the reference material in ../shared, which is not here")
    return SHARED


@pytest.fixture(scope="session")
def tok():
    """A small SentencePiece tokenizer with 12B's control tokens: the demo's."""
    from telechat.data.tokenizer import Tokenizer

    return Tokenizer.from_pretrained(ROOT / "samples/tokenizer.model")


@pytest.fixture(scope="session")
def tok_12b(shared):
    from telechat.data.tokenizer import Tokenizer

    return Tokenizer.from_pretrained(shared / "data/telechat_12b.tokenizer.model")


@pytest.fixture(scope="session")
def tok_52b(shared):
    from telechat.data.tokenizer import Tokenizer

    return Tokenizer.from_pretrained(shared / "data/telechat_52b.tokenizer.model")


@dataclasses.dataclass(frozen=True)
class Reference:
    """A tiny official checkpoint, the same converted to ours, and what the official code computes."""

    official: pathlib.Path
    directory: pathlib.Path
    golden: dict

    def model(self, dtype="float32"):
        from telechat import TeleChat

        return TeleChat.from_pretrained(self.directory, dtype)


@pytest.fixture(scope="session", params=MODELS)
def reference(request, shared, tmp_path_factory):
    """A `Reference` of each model in turn."""
    from telechat.checkpoint.convert import torch_to_ms

    official = shared / "reference" / f"{request.param}_tiny"
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


def load_tool(name):
    """The module tools/<name>.py."""
    spec = importlib.util.spec_from_file_location(f"{name}_tool", ROOT / "tools" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def assert_refused(result, *words):
    """A tool that was run as a process refused with one sentence that holds ``words``."""
    assert_one_sentence(result.returncode, result.stderr, words)


def assert_one_sentence(status, stderr, words):
    """Status 2 and one line "error: …" on stderr that holds each of ``words``, and no traceback."""
    lines = [line for line in stderr.splitlines() if line.startswith("error: ")]
    assert status == 2, (status, stderr)
    assert "Traceback" not in stderr
    assert len(lines) == 1, stderr
    for word in words:
        assert str(word) in lines[0], (word, lines[0])


def save_small_model(directory, seed=0, **fields):
    """Save a random model of 32 × 2 layers that matches the sample tokenizer, and that beside it."""
    from telechat import TeleChat, TeleChatConfig

    small = dict(vocab_size=1664, hidden_size=32, n_layer=2, n_head=4, ffn_hidden_size=48, initializer_range=0.3)
    TeleChat(TeleChatConfig(**{**small, **fields}), seed=seed).save_pretrained(directory)
    shutil.copy(ROOT / "samples" / "tokenizer.model", directory)


def preprocess_samples(path, *flags, max_length=160):
    """Preprocess the sample conversations into ``path``; returns it."""
    subprocess.run([sys.executable, str(ROOT / "tools/preprocess.py"), "--input_dataset_file",
                    str(ROOT / "samples/conversations.jsonl"), "--output_path", str(path), "--vocab_file_path",
                    str(ROOT / "samples/tokenizer.model"), "--max_length", str(max_length), *map(str, flags)],
                   check=True, capture_output=True)
    return path
