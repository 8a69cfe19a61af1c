"""Compiling the operators: no compiler, a broken one, several processes at once, another processor's."""

import os
import platform
import shutil
import subprocess
import sys

import mindspore as ms
import pytest

from telechat import InputError
from telechat.nn import log
from telechat.nn.cpu import build
from telechat.nn.kernel_choice import choose_kernels
from telechat.nn.kernels import Kernels
from tests.conftest import ROOT
from tests.test_model import small_config


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache folder, and a process that has loaded nothing."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(build, "load_library", build.load_library.__wrapped__)
    monkeypatch.setattr(log, "_said", set())
    return tmp_path / "telechat"


def test_without_a_compiler_kernels_are_portable(cache, monkeypatch, capsys):
    monkeypatch.setattr(build, "compiler", lambda: None)
    for _ in range(2):
        assert type(choose_kernels(small_config(), ms.float32)) is Kernels
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and "no C++ compiler" in lines[0]
    with pytest.raises(InputError, match="kernels is \"cpu\" and its operators could not be compiled"):
        choose_kernels(small_config(), ms.float32, "cpu")


def test_a_compiler_that_fails_leaves_nothing(cache, monkeypatch, tmp_path, capsys):
    broken = tmp_path / "c++"
    broken.write_text("#!/bin/sh\necho it is broken >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("CXX", str(broken))
    assert build.load_library() is None
    assert "it is broken" in capsys.readouterr().err
    assert [path.name for path in cache.iterdir()] == ["lock"]


def test_float16_weights_are_portable():
    assert type(choose_kernels(small_config(), ms.float16)) is Kernels


def test_pip_installs_without_a_compiler(tmp_path):
    """From a source distribution, which holds the operators' sources: no build makes anything of a machine's own."""
    source, target = tmp_path / "source", tmp_path / "installed"
    source.mkdir()
    for name in ("setup.py", "README.md"):
        shutil.copy(ROOT / name, source)
    shutil.copytree(ROOT / "telechat", source / "telechat", ignore=shutil.ignore_patterns("__pycache__"))
    nowhere = str(tmp_path / "nowhere")
    environment = dict(os.environ, PATH=nowhere, CC=nowhere, CXX=nowhere, XDG_CACHE_HOME=str(tmp_path), PYTHONPATH="")

    def run(*arguments, **more):
        command = [sys.executable, *map(str, arguments)]
        result = subprocess.run(command, env={**environment, **more}, cwd=source, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        return result

    run("setup.py", "-q", "sdist", "--dist-dir", tmp_path)
    archive, = tmp_path.glob("telechat-*.tar.gz")
    run("-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation", "--no-index", "--target", target, archive)
    assert "Tag: py3-none-any" in next(target.glob("telechat-*.dist-info/WHEEL")).read_text()
    files = {path.relative_to(target / "telechat"): path.read_bytes() for path in (target / "telechat").rglob("*.*")}
    for path in [*(ROOT / "telechat").rglob("*.py"), *build.SOURCES.glob("*.cpp"), *build.SOURCES.glob("*.h")]:
        assert files[path.relative_to(ROOT / "telechat")] == path.read_bytes()
    shutil.rmtree(source / "telechat")
    result = run("-c", "import mindspore as ms, telechat\nfrom telechat.nn.kernel_choice import choose_kernels\n"
                       "print(telechat.__file__, choose_kernels(telechat.TeleChatConfig(8, 8, 1, 1, 8), ms.float32).describe())",
                 PYTHONPATH=str(target))
    assert result.stdout.split(" ", 1) == [str(target / "telechat/__init__.py"),
                                           "attention portable, decoding portable, all else portable\n"]
    assert [line for line in result.stderr.splitlines() if line.startswith("kernels: ")] == [
        "kernels: portable operations: the operators for CPUs could not be compiled: no C++ compiler (g++ or clang++) was found"]


@pytest.mark.skipif(build.compiler() is None, reason="needs a C++ compiler, which is not here")
def test_processes_that_ask_at_once_compile_once(cache, monkeypatch, tmp_path):
    """The compiler is a script that counts; what it makes is a library of one function."""
    source, calls = tmp_path / "one.cpp", tmp_path / "calls"
    source.write_text('extern "C" void set_thread_count(int) {}\n')
    counting = tmp_path / "counting"
    counting.write_text(f'#!/bin/sh\necho >> {calls}\nfor last; do :; done\n'
                        f'exec {build.compiler()} -shared -fPIC {source} -o "$last"\n')
    counting.chmod(0o755)
    monkeypatch.setenv("CXX", str(counting))
    program = "from telechat.nn.cpu import build; assert build.load_library() is not None"
    processes = [subprocess.Popen([sys.executable, "-c", program]) for _ in range(3)]
    assert [process.wait(120) for process in processes] == [0, 0, 0]
    assert len(calls.read_text().splitlines()) == len(list(build.SOURCES.glob("*.cpp"))) + 1
    assert sorted(path.suffix for path in cache.iterdir()) == ["", ".so"]


@pytest.mark.parametrize("command, flags", [("aarch64-linux-gnu-g++", ("-mcpu=neoverse-n1",)), ("g++", ("-msse2",))])
def test_every_source_compiles_for_other_processors(tmp_path, command, flags):
    """Without a warning; what comes out for another processor cannot run here."""
    if shutil.which(command) is None or (command == "g++" and platform.machine() != "x86_64"):
        pytest.skip(f"needs {command}, which is not here")
    build.compile_library(command, tmp_path / "operators.so", (*build.FLAGS, *flags, "-Wall", "-Wextra", "-Werror"))
    assert (tmp_path / "operators.so").stat().st_size > 10000
