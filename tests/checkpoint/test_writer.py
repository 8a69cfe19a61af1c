"""write_checkpoint: what lands on disk, read by the safetensors library, and what failures leave."""

import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file

from telechat.checkpoint.dtypes import numpy_dtype
from telechat.checkpoint.layout import parameter_shapes
from telechat.checkpoint.reader import CheckpointReader
from telechat.checkpoint.writer import write_checkpoint
from telechat.config import TeleChatConfig
from telechat.errors import InputError

ROOT = pathlib.Path(__file__).resolve().parents[2]
CONFIG = TeleChatConfig.from_dict({"vocab_size": 24, "hidden_size": 16, "n_layer": 2, "n_head": 2,
                                   "ffn_hidden_size": 20, "tie_word_embeddings": False, "unused_key": [1]})


def make_tensors(value=None, dtype="float32"):
    generator = np.random.default_rng(0)
    return {name: (generator.standard_normal(shape) if value is None else np.full(shape, value)).astype(
        numpy_dtype(dtype)) for name, shape in parameter_shapes(CONFIG).items()}


def constant(directory):
    """The one value that all tensors of `directory` have; fails if they differ."""
    reader = CheckpointReader(directory)
    reader.check(parameter_shapes(CONFIG))
    values = {float(value) for name in reader.names for value in np.unique(reader.read(name))}
    assert len(values) == 1
    return values.pop()


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_single_file(tmp_path, dtype):
    tensors = make_tensors(dtype=dtype)
    size = write_checkpoint(tmp_path / "new", CONFIG, reversed(list(tensors.items())))
    assert sorted(os.listdir(tmp_path / "new")) == ["config.json", "model.safetensors"]
    assert json.loads((tmp_path / "new/config.json").read_text()) == CONFIG.to_dict()
    loaded = load_file(tmp_path / "new/model.safetensors")
    assert size == sum(array.nbytes for array in tensors.values())
    assert set(loaded) == set(tensors)
    for name, array in tensors.items():
        assert loaded[name].dtype == array.dtype and loaded[name].tobytes() == array.tobytes()
    with safe_open(tmp_path / "new/model.safetensors", "np") as file:
        assert file.metadata() == {"format": "pt"}


def test_arrays_that_are_not_contiguous(tmp_path):
    tensors = make_tensors()
    name = "transformer.h.1.mlp.down_proj.weight"
    backwards = np.asfortranarray(tensors[name])
    write_checkpoint(tmp_path, CONFIG, {**tensors, name: backwards}.items())
    assert np.array_equal(load_file(tmp_path / "model.safetensors")[name], tensors[name])


def test_shards_and_index(tmp_path):
    tensors = make_tensors()
    limit = 3000
    size = write_checkpoint(tmp_path, CONFIG, tensors.items(), max_shard_bytes=limit)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == size == sum(array.nbytes for array in tensors.values())
    files = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert len(files) > 3
    assert files == [f"model-{i:05d}-of-{len(files):05d}.safetensors" for i in range(1, len(files) + 1)]
    assert set(index["weight_map"]) == set(tensors)
    for file in files:
        loaded = load_file(tmp_path / file)
        assert set(loaded) == {name for name, owner in index["weight_map"].items() if owner == file}
        assert len(loaded) == 1 or sum(array.nbytes for array in loaded.values()) <= limit
        for name, array in loaded.items():
            assert np.array_equal(array, tensors[name])


@pytest.mark.parametrize("before, after", [(3000, 10**9), (10**9, 3000), (3000, 1500)])
def test_an_older_checkpoint_is_replaced_whole_and_other_files_stay(tmp_path, before, after):
    write_checkpoint(tmp_path, CONFIG, make_tensors(1).items(), max_shard_bytes=before)
    (tmp_path / "tokenizer.model").write_text("tokens")
    (tmp_path / "notes.safetensors").write_text("mine")
    write_checkpoint(tmp_path, CONFIG, make_tensors(2).items(), max_shard_bytes=after)
    assert constant(tmp_path) == 2
    index = tmp_path / "model.safetensors.index.json"
    weights = {"model.safetensors"}
    if after < 10**9:
        weights = {index.name, *json.loads(index.read_text())["weight_map"].values()}
    assert set(os.listdir(tmp_path)) == weights | {"config.json", "tokenizer.model", "notes.safetensors"}


@pytest.mark.parametrize("change, message", [
    (lambda t: t.pop("lm_head.weight"), "1 missing: lm_head.weight"),
    (lambda t: t.update(odd=np.zeros(3, np.float32)), "1 not expected: odd"),
    (lambda t: t.update({"lm_head.weight": np.zeros((3, 2), np.float32)}),
     r"lm_head.weight is \(3, 2\) and must be"),
    (lambda t: t.update({"lm_head.weight": np.zeros((24, 16))}), "lm_head.weight is float64"),
])
def test_wrong_tensors_leave_the_old_checkpoint(tmp_path, change, message):
    write_checkpoint(tmp_path, CONFIG, make_tensors(1).items())
    before = sorted(os.listdir(tmp_path))
    tensors = make_tensors(2)
    change(tensors)
    with pytest.raises(InputError, match=message):
        write_checkpoint(tmp_path, CONFIG, tensors.items())
    assert sorted(os.listdir(tmp_path)) == before and constant(tmp_path) == 1
    with pytest.raises(InputError):
        write_checkpoint(tmp_path / "new", CONFIG, tensors.items())
    assert not (tmp_path / "new").exists()


def test_a_tensor_that_comes_twice(tmp_path):
    tensors = list(make_tensors().items())
    with pytest.raises(InputError, match="lm_head.weight came twice"):
        write_checkpoint(tmp_path / "new", CONFIG, tensors + tensors[-1:])
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("stop", [KeyboardInterrupt, ZeroDivisionError])
def test_an_interrupt_leaves_the_old_checkpoint(tmp_path, stop):
    write_checkpoint(tmp_path, CONFIG, make_tensors(1).items())

    def tensors():
        yield from list(make_tensors(2).items())[:5]
        raise stop

    with pytest.raises(stop):
        write_checkpoint(tmp_path, CONFIG, tensors(), max_shard_bytes=2000)
    assert sorted(os.listdir(tmp_path)) == ["config.json", "model.safetensors"] and constant(tmp_path) == 1


CHILD = f"""
import os, signal, sys
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests/checkpoint")!r}]
import resource
from telechat.errors import InputError
from test_writer import CONFIG, make_tensors, write_checkpoint
directory = sys.argv[1]
"""


def run_child(code, directory, *arguments):
    command = [sys.executable, "-c", CHILD + code, str(directory), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=directory)


def test_killed_at_any_moment_leaves_the_old_or_the_new(tmp_path):
    """SIGKILL between two tensors, and just before each rename and each removal."""
    code = """
calls = []
moment = int(sys.argv[2])
def counted(function):
    def call(*arguments):
        calls.append(str(arguments[-1]))
        if len(calls) == moment:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*arguments)
    return call
for name in ("rename", "replace", "remove", "rmdir"):
    setattr(os, name, counted(getattr(os, name)))
def tensors():
    for name, array in make_tensors(2).items():
        yield name, array
        if moment == 0 and "h.1" in name:
            os.kill(os.getpid(), signal.SIGKILL)
write_checkpoint(directory, CONFIG, tensors(), max_shard_bytes=12000)
# The rename that makes the new checkpoint count; all calls.
print([number for number, name in enumerate(calls, 1) if name.endswith("complete")][0], len(calls))
"""
    old = tmp_path / "old"
    write_checkpoint(old, CONFIG, make_tensors(1).items(), max_shard_bytes=9000)
    (old / "tokenizer.model").write_text("tokens")
    whole = run_child(code, shutil.copytree(old, tmp_path / "whole"), -1)
    counts, calls = map(int, whole.stdout.split())
    assert 2 < counts < calls - 4, whole.stderr  # there are moments on either side
    assert constant(tmp_path / "whole") == 2
    for moment in range(calls + 1):
        directory = shutil.copytree(old, tmp_path / str(moment))
        assert run_child(code, directory, moment).returncode == -signal.SIGKILL
        assert constant(directory) == (2 if moment > counts else 1)
        write_checkpoint(directory, CONFIG, make_tensors(3).items())
        assert constant(directory) == 3
        assert sorted(os.listdir(directory)) == ["config.json", "model.safetensors", "tokenizer.model"]


def test_full_disk(tmp_path):
    """A limit on the size of files stands for the full disk: writes fail in the middle of a shard."""
    write_checkpoint(tmp_path, CONFIG, make_tensors(1).items())
    code = """
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))
for target in (directory, directory + "/new"):
    try:
        write_checkpoint(target, CONFIG, make_tensors(2).items())
    except InputError as error:
        print(error)
"""
    result = run_child(code, tmp_path)
    lines = result.stdout.splitlines()
    assert len(lines) == 2, result.stderr
    assert lines[0].startswith(f"{tmp_path} cannot be written (File too large)")
    assert sorted(os.listdir(tmp_path)) == ["config.json", "model.safetensors"] and constant(tmp_path) == 1


def test_unwritable_target(tmp_path):
    (tmp_path / "file").write_text("")
    for target in (tmp_path / "file", tmp_path / "file/below"):
        with pytest.raises(InputError, match="cannot be written"):
            write_checkpoint(target, CONFIG, make_tensors().items())
    assert (tmp_path / "file").read_text() == ""


def test_torch_weights_are_not_mixed_with(tmp_path):
    (tmp_path / "pytorch_model_00001-of-00002.bin").write_text("")
    with pytest.raises(InputError, match="already holds pytorch_model_00001-of-00002.bin"):
        write_checkpoint(tmp_path, CONFIG, make_tensors().items())
    assert os.listdir(tmp_path) == ["pytorch_model_00001-of-00002.bin"]


def test_current_directory_and_link(tmp_path, monkeypatch):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    write_checkpoint(tmp_path / "link", CONFIG, make_tensors(1).items())
    assert (tmp_path / "link").is_symlink() and constant(tmp_path / "real") == 1
    monkeypatch.chdir(tmp_path / "real")
    write_checkpoint(".", CONFIG, make_tensors(2).items())
    assert constant(tmp_path / "real") == 2
