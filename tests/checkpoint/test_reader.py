"""CheckpointReader on files written by the safetensors library, not by our writer."""

import json
import os
import tracemalloc

import numpy as np
import pytest
from safetensors.numpy import save_file

from telechat.checkpoint import safetensors_files
from telechat.checkpoint.dtypes import numpy_dtype
from telechat.checkpoint.layout import parameter_shapes
from telechat.checkpoint.reader import CheckpointReader, read_as
from telechat.checkpoint.writer import write_checkpoint
from telechat.config import TeleChatConfig
from telechat.errors import InputError

VALUES = {"vocab_size": 24, "hidden_size": 16, "n_layer": 2, "n_head": 2, "ffn_hidden_size": 20,
          "tie_word_embeddings": False}
CONFIG = TeleChatConfig.from_dict(VALUES)


@pytest.fixture
def tensors():
    generator = np.random.default_rng(0)
    return {name: generator.standard_normal(shape).astype(np.float32)
            for name, shape in parameter_shapes(CONFIG).items()}


@pytest.fixture
def directory(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(VALUES))
    return tmp_path


def test_single_file(directory, tensors):
    save_file(tensors, directory / "model.safetensors")
    reader = CheckpointReader(directory)
    reader.check(parameter_shapes(CONFIG))
    assert reader.config == CONFIG
    assert reader.names == list(parameter_shapes(CONFIG))
    for name, array in tensors.items():
        assert reader.shape(name) == array.shape and reader.dtype(name) == np.float32
        assert np.array_equal(reader.read(name), array)


def test_shards_and_slices_of_every_dtype(directory, tensors):
    names = list(tensors)
    stored = {name: array.astype(numpy_dtype(("float32", "float16", "bfloat16")[i % 3]))
              for i, (name, array) in enumerate(tensors.items())}
    files = [f"model-{i}-of-00002.safetensors" for i in ("00001", "00002")]
    save_file({name: stored[name] for name in names[::2]}, directory / files[0])
    save_file({name: stored[name] for name in names[1::2]}, directory / files[1])
    (directory / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {name: files[i % 2] for i, name in enumerate(names)}}))
    # Not in the index, so not read.
    save_file({"old": np.zeros(3)}, directory / "model-00001-of-00007.safetensors")
    reader = CheckpointReader(directory)
    reader.check(parameter_shapes(CONFIG))
    for name, array in stored.items():
        assert reader.dtype(name) == array.dtype
        for index in ((slice(1, 7), slice(3, None)), (slice(1, 7), slice(None)), (slice(-7, -1),)):
            part = reader.read(name, index[:array.ndim])
            assert part.dtype == array.dtype and part.tobytes() == array[index[:array.ndim]].tobytes()


def test_a_slice_reads_only_itself(directory):
    save_file({"transformer.word_embeddings.weight": np.ones((1024, 4096), np.float32)},
              directory / "model.safetensors")
    reader = CheckpointReader(directory)
    tracemalloc.start()
    part = reader.read("transformer.word_embeddings.weight", (slice(8, 16), slice(None)))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert part.shape == (8, 4096)
    assert peak < 2 * 2**20  # the slice is 128 KiB, the tensor 16 MiB


def test_check_lists_all_that_is_wrong(directory, tensors):
    del tensors["transformer.h.0.mlp.up_proj.weight"], tensors["lm_head.weight"]
    tensors["transformer.h.9.mlp.up_proj.weight"] = np.zeros(2, np.float32)
    tensors["transformer.ln_f.weight"] = np.zeros(3, np.float32)
    save_file(tensors, directory / "model.safetensors")
    with pytest.raises(InputError) as error:
        CheckpointReader(directory).check(parameter_shapes(CONFIG))
    message = str(error.value)
    assert message.startswith(str(directory))
    assert "2 missing: transformer.h.0.mlp.up_proj.weight, lm_head.weight" in message
    assert "1 not expected: transformer.h.9.mlp.up_proj.weight" in message
    assert "transformer.ln_f.weight is (3,) and must be (16,)" in message


def test_other_dtypes_are_refused(directory, tensors):
    tensors["transformer.ln_f.weight"] = np.zeros(16, np.int8)
    save_file(tensors, directory / "model.safetensors")
    with pytest.raises(InputError, match="transformer.ln_f.weight is I8"):
        CheckpointReader(directory).check(parameter_shapes(CONFIG))


@pytest.mark.parametrize("keep", [0, 5, 100, -1])
def test_truncated_file_is_named(directory, tensors, keep):
    path = directory / "model.safetensors"
    save_file(tensors, path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(InputError, match="model.safetensors is broken or cut short"):
        CheckpointReader(directory)


def test_large_tensors_are_read_in_parts(directory, tensors, monkeypatch):
    monkeypatch.setattr(safetensors_files, "PART", 100)
    save_file(tensors, directory / "model.safetensors")
    reader = CheckpointReader(directory)
    assert max(tensor.nbytes for tensor in tensors.values()) > 1000
    for name, tensor in tensors.items():
        assert np.array_equal(reader.read(name), tensor)


@pytest.mark.parametrize("index", [None, (slice(3, 90), slice(None)), (slice(5, 95), slice(2, 7))])
def test_tensors_are_converted_in_parts(tmp_path, monkeypatch, index):
    """Nothing but the result is ever there whole; its bits are those of the whole tensor's conversion."""
    config = TeleChatConfig(vocab_size=50_000, hidden_size=32, n_layer=1, n_head=4, ffn_hidden_size=48)
    draw = np.random.default_rng(0)
    tensors = {name: draw.standard_normal(shape, np.float32) for name, shape in parameter_shapes(config).items()}
    write_checkpoint(tmp_path, config, tensors.items())
    reader, name = CheckpointReader(tmp_path), "transformer.word_embeddings.weight"
    monkeypatch.setattr("telechat.checkpoint.reader.PART", 100_000)
    tracemalloc.start()
    found = read_as(reader, name, "bfloat16", index)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    expected = tensors[name][index or ()].astype(numpy_dtype("bfloat16"))
    assert found.dtype == expected.dtype and np.array_equal(found.view(np.uint16), expected.view(np.uint16))
    assert peak < found.nbytes + 1_000_000 < tensors[name].nbytes
    assert np.array_equal(read_as(reader, name, "float32", index), tensors[name][index or ()])


def test_a_conversion_that_overflows(tmp_path):
    config = TeleChatConfig(vocab_size=64, hidden_size=32, n_layer=1, n_head=4, ffn_hidden_size=48)
    write_checkpoint(tmp_path, config, ((name, np.full(shape, 7e4, np.float32)) for name, shape in parameter_shapes(config).items()))
    with pytest.raises(InputError, match="beyond the range of float16; use bfloat16 or float32"):
        read_as(CheckpointReader(tmp_path), "lm_head.weight", "float16")


@pytest.mark.parametrize("part", [1 << 20, 7])
def test_a_file_that_is_cut_while_it_is_read(directory, tensors, monkeypatch, part):
    monkeypatch.setattr(safetensors_files, "PART", part)
    path = directory / "model.safetensors"
    save_file(tensors, path)
    reader = CheckpointReader(directory)
    os.truncate(path, path.stat().st_size - 1)
    last = max(tensors, key=reader._files._offsets.get)
    with pytest.raises(InputError, match="model.safetensors cannot be read .it ends within a tensor.; has it been changed"):
        reader.read(last)


def test_index_that_lists_an_absent_file(directory, tensors):
    save_file(tensors, directory / "model-00001-of-00002.safetensors")
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {
        "a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}))
    with pytest.raises(InputError, match="lists model-00002-of-00002.safetensors, which is not there"):
        CheckpointReader(directory)


@pytest.mark.parametrize("content, said", [
    ("", "is empty; download it again"), ("[]", "must hold a JSON object"), ("{}", "is not a weight index"),
    ('{"weight_map": 3}', "is not a weight index"), ('{"weight_map": {"a": 3, "b": 4}}', "is not a weight index")])
def test_broken_index(directory, tensors, content, said):
    save_file(tensors, directory / "model.safetensors")
    (directory / "model.safetensors.index.json").write_text(content)
    with pytest.raises(InputError, match=f"index.json {said}"):
        CheckpointReader(directory)


def test_tensor_in_two_files(directory, tensors):
    save_file(tensors, directory / "model-00001-of-00002.safetensors")
    save_file({"lm_head.weight": tensors["lm_head.weight"]}, directory / "model-00002-of-00002.safetensors")
    with pytest.raises(InputError, match="lm_head.weight is in both model-00001.* and model-00002"):
        CheckpointReader(directory)


def test_absent_things(directory, tmp_path):
    with pytest.raises(InputError, match="holds no model.safetensors"):
        CheckpointReader(directory)
    with pytest.raises(InputError, match="nowhere is not a directory"):
        CheckpointReader(tmp_path / "nowhere")
    (directory / "config.json").unlink()
    with pytest.raises(InputError, match="config.json cannot be read"):
        CheckpointReader(directory)


def test_torch_weights_say_how_to_convert(reference):
    with pytest.raises(InputError) as error:
        CheckpointReader(reference)
    command = f"python tools/convert.py torch-to-ms --torch_path {reference} --mindspore_path"
    assert command in str(error.value)


@pytest.mark.parametrize("model", ["7b", "52b"])
def test_published_safetensors_say_how_to_convert(tmp_path, make_official, model):
    config, state = make_official(model)
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file({name: tensor.numpy() for name, tensor in state.items()}, tmp_path / "model.safetensors")
    with pytest.raises(InputError, match="published layout: run `python tools/convert.py torch-to-ms"):
        CheckpointReader(tmp_path)


def test_published_12b_safetensors_are_ours_already(tmp_path, make_official):
    config, state = make_official("12b")
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file({name: tensor.numpy() for name, tensor in state.items()}, tmp_path / "model.safetensors")
    reader = CheckpointReader(tmp_path)
    reader.check(parameter_shapes(reader.config))
    assert np.array_equal(reader.read("lm_head.weight"), state["lm_head.weight"].numpy())
