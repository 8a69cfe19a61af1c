"""torch-to-ms and ms-to-torch, against torch's own loader and a second statement of the mapping."""

import json
import os

import numpy as np
import pytest

from telechat.checkpoint.convert import ms_to_torch, torch_to_ms
from telechat.checkpoint.layout import parameter_shapes
from telechat.checkpoint.reader import CheckpointReader
from telechat.checkpoint.writer import write_checkpoint
from telechat.errors import InputError

torch = pytest.importorskip("torch", reason="conversion needs torch: install the extra `convert`")
safetensors_torch = pytest.importorskip("safetensors.torch")

MODELS = ("7b", "12b", "52b")
DTYPES = ("float32", "float16", "bfloat16")


def assert_holds(directory, expected, bits):
    """`directory` is a whole checkpoint of ours with exactly the tensors `expected` (canonical → torch)."""
    reader = CheckpointReader(directory)
    reader.check(parameter_shapes(reader.config))
    assert set(reader.names) == set(expected)
    for name, tensor in expected.items():
        assert bits(reader.read(name)) == bits(tensor), name


@pytest.mark.parametrize("format", ["bin", "safetensors"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_reference_there_and_back(reference, tmp_path, load_official, canonical_of, bits, dtype, format):
    original = load_official(reference)
    config = json.loads((reference / "config.json").read_text())
    original = {name: tensor.to(getattr(torch, dtype)) for name, tensor in original.items()}
    torch_to_ms(reference, tmp_path / "ms", dtype=dtype)
    assert_holds(tmp_path / "ms", canonical_of(config, original), bits)
    assert json.loads((tmp_path / "ms/config.json").read_text()) == config

    ms_to_torch(tmp_path / "ms", tmp_path / "back", format=format, max_shard_bytes=100_000)
    assert json.loads((tmp_path / "back/config.json").read_text()) == config
    if format == "bin":
        back = load_official(tmp_path / "back")
        separator = "-" if "52b" in reference.name else "_"
        files = sorted(path.name for path in (tmp_path / "back").glob("*.bin"))
        assert len(files) > 1
        assert files == [f"pytorch_model{separator}{i:05d}-of-{len(files):05d}.bin"
                         for i in range(1, len(files) + 1)]
    else:
        back = {}
        for file in sorted((tmp_path / "back").glob("model-*.safetensors")):
            back.update(safetensors_torch.load_file(file))
        index = json.loads((tmp_path / "back/model.safetensors.index.json").read_text())
        assert set(index["weight_map"]) == set(back)
    published = json.loads((reference / "pytorch_model.bin.index.json").read_text())["weight_map"]
    assert set(back) == set(published)
    for name, tensor in original.items():
        assert bits(back[name]) == bits(tensor), name


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("shards, separator, index, zip_format, sizes", [
    (1, "_", False, True, dict(hidden=64, heads=1, layers=1)),
    (1, "_", False, False, dict(hidden=48, heads=3, inner=100)),
    (3, "-", False, True, dict(hidden=64, heads=16, vocab=300)),
    (7, "_", True, True, dict(hidden=24, heads=2, layers=5, inner=10)),
    (2, "-", True, False, dict(hidden=80, heads=5)),
])
def test_other_sizes_files_and_formats(tmp_path, make_official, write_official, load_official, canonical_of,
                                       bits, model, shards, separator, index, zip_format, sizes):
    config, state = make_official(model, dtype="float16", **sizes)
    source = write_official(config, state, shards=shards, separator=separator, index=index,
                            zip_format=zip_format)
    torch_to_ms(source, tmp_path / "ms", model_name=f"telechat_{model}")
    assert_holds(tmp_path / "ms", canonical_of(config, state), bits)
    ms_to_torch(tmp_path / "ms", tmp_path / "back")
    back = load_official(tmp_path / "back")
    assert set(back) == set(state)
    for name, tensor in state.items():
        assert bits(back[name]) == bits(tensor), name


def test_grouped_heads_of_52b_there_and_back(tmp_path, make_official, write_official, load_official, bits):
    config, state = make_official("52b", heads=6)
    config["num_key_value_heads"] = 2
    for layer in range(2):
        state[f"transformer.h.{layer}.attn.c_attn.weight"] = torch.randn(48, 48 + 2 * 16)
    torch_to_ms(write_official(config, state), tmp_path / "ms")
    reader = CheckpointReader(tmp_path / "ms")
    key_value = torch.from_numpy(reader.read("transformer.h.1.self_attention.key_value.weight"))
    key_value = key_value.reshape(2, 2, 8, 48)
    columns = state["transformer.h.1.attn.c_attn.weight"].T
    assert torch.equal(key_value[1, 0], columns[48 + 8:48 + 16])
    assert torch.equal(key_value[0, 1], columns[64:64 + 8])
    ms_to_torch(tmp_path / "ms", tmp_path / "back")
    assert {name: bits(tensor) for name, tensor in load_official(tmp_path / "back").items()} == {
        name: bits(tensor) for name, tensor in state.items()}


@pytest.mark.parametrize("model", MODELS)
def test_safetensors_in_either_layout(tmp_path, make_official, canonical_of, bits, model):
    config, state = make_official(model, dtype="bfloat16")
    canonical = canonical_of(config, state)
    for name, tensors in (("published", state), ("ours", canonical)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(config))
        safetensors_torch.save_file({k: v.contiguous() for k, v in tensors.items()},
                                    tmp_path / name / "model.safetensors")
        torch_to_ms(tmp_path / name, tmp_path / f"from-{name}")
        assert_holds(tmp_path / f"from-{name}", canonical, bits)


def test_7b_with_prefix_and_repeated_head(tmp_path, make_official, write_official, canonical_of, bits):
    """As transformers saves a fine-tuned 7B: with the prefix, and the tied head as a tensor of its own."""
    config, state = make_official("7b")
    canonical = canonical_of(config, state)
    saved = {**canonical, "lm_head.weight": state["word_embeddings.weight"]}
    torch_to_ms(write_official(config, saved, shards=2), tmp_path / "ms")
    assert_holds(tmp_path / "ms", canonical, bits)
    saved["lm_head.weight"] = saved["lm_head.weight"] + 1
    with pytest.raises(InputError, match="1 not expected: lm_head.weight"):
        torch_to_ms(write_official(config, saved, name="other"), tmp_path / "ms2")
    assert not (tmp_path / "ms2").exists()


def test_buffers_of_the_code_are_ignored(tmp_path, make_official, write_official, canonical_of, bits):
    config, state = make_official("52b")
    canonical = canonical_of(config, state)
    state["transformer.h.0.attn.bias"] = torch.ones(1, 1, 8, 8, dtype=torch.bool)
    torch_to_ms(write_official(config, state), tmp_path / "ms")
    assert_holds(tmp_path / "ms", canonical, bits)


def test_tensors_that_share_or_stride_memory(tmp_path, make_official, write_official, canonical_of, bits):
    config, state = make_official("12b")
    block = "transformer.h.0."
    both = torch.cat((state[block + "mlp.gate_proj.weight"], state[block + "mlp.up_proj.weight"]))
    saved = {**state, block + "mlp.gate_proj.weight": both[:40], block + "mlp.up_proj.weight": both[40:],
             block + "mlp.down_proj.weight": state[block + "mlp.down_proj.weight"].T.contiguous().T,
             "lm_head.weight": torch.nn.Parameter(state["lm_head.weight"])}
    torch_to_ms(write_official(config, saved), tmp_path / "ms")
    assert_holds(tmp_path / "ms", canonical_of(config, state), bits)


@pytest.mark.parametrize("source", DTYPES)
@pytest.mark.parametrize("target", DTYPES)
def test_casting_rounds_as_torch_does(tmp_path, make_official, write_official, bits, source, target):
    config, state = make_official("12b", vocab=4096)
    # Every exponent and random mantissas, ties included, but nothing beyond float16's range.
    patterns = np.random.default_rng(0).integers(0, 2**32, 4096 * 48, dtype=np.uint32)
    patterns[::3] &= 0xFFFF8000  # halfway between two bfloat16
    patterns[1::3] &= 0xFFFFF000  # halfway between two float16
    values = patterns.view(np.float32).reshape(4096, 48)
    values = np.where(np.isfinite(values) & (np.abs(values) < 60000), values, 1)
    state["lm_head.weight"] = torch.from_numpy(values)
    state = {name: tensor.to(getattr(torch, source)) for name, tensor in state.items()}
    torch_to_ms(write_official(config, state), tmp_path / "ms", dtype=target)
    reader = CheckpointReader(tmp_path / "ms")
    assert bits(reader.read("lm_head.weight")) == bits(state["lm_head.weight"].to(getattr(torch, target)))
    ms_to_torch(tmp_path / "ms", tmp_path / "back", dtype="float32")
    back = torch.load(tmp_path / "back/pytorch_model_00001-of-00001.bin", weights_only=True)
    assert torch.equal(back["lm_head.weight"], state["lm_head.weight"].to(getattr(torch, target)).float())


def test_casting_beyond_the_range_is_refused(tmp_path, make_official, write_official):
    config, state = make_official("12b")
    state["transformer.ln_f.weight"][3] = 70000.0
    with pytest.raises(InputError, match="transformer.ln_f.weight holds values beyond the range of float16"):
        torch_to_ms(write_official(config, state), tmp_path / "ms", dtype="float16")
    assert not (tmp_path / "ms").exists()


def test_mixed_dtypes_stay(tmp_path, make_official, write_official, load_official, canonical_of, bits):
    config, state = make_official("52b", dtype="bfloat16", layers=3)
    for name in state:
        if "ln_" in name:
            state[name] = state[name].float()
    torch_to_ms(write_official(config, state), tmp_path / "ms")
    assert_holds(tmp_path / "ms", canonical_of(config, state), bits)
    for format in ("bin", "safetensors"):
        ms_to_torch(tmp_path / "ms", tmp_path / format, format=format)
    path = tmp_path / "safetensors/model.safetensors"
    for loaded in (load_official(tmp_path / "bin"), safetensors_torch.load_file(path)):
        assert {k: bits(v) for k, v in loaded.items()} == {k: bits(v) for k, v in state.items()}
    content = path.read_bytes()
    header = json.loads(content[8:8 + int.from_bytes(content[:8], "little")])
    for name, tensor in state.items():  # aligned, for readers that map the file
        assert header[name]["data_offsets"][0] % tensor.element_size() == 0


def test_dtypes_that_cannot_be_fused(tmp_path, make_official, write_official, load_official, bits):
    config, state = make_official("52b")
    torch_to_ms(write_official(config, state), tmp_path / "ms")
    reader = CheckpointReader(tmp_path / "ms")
    names = ["transformer.h.1.self_attention.query.weight", "transformer.h.1.self_attention.key_value.weight"]
    tensors = {name: reader.read(name) for name in reader.names}
    tensors[names[0]] = tensors[names[0]].astype(np.float16)
    write_checkpoint(tmp_path / "mixed", reader.config, tensors.items())
    with pytest.raises(InputError, match=f"{' and '.join(names)} have different dtypes in .*; give --dtype"):
        ms_to_torch(tmp_path / "mixed", tmp_path / "back")
    assert not (tmp_path / "back").exists()
    ms_to_torch(tmp_path / "mixed", tmp_path / "back", dtype="float16")
    for name, tensor in load_official(tmp_path / "back").items():
        assert bits(tensor) == bits(state[name].half())


@pytest.mark.parametrize("model", MODELS)
def test_tokenizer_and_generation_config_go_along(tmp_path, make_official, write_official, model):
    source = write_official(*make_official(model))
    extras = ["tokenizer.model", "tokenizer.json", "tokenizer_config.json", "generation_config.json"]
    for name in extras:
        (source / name).write_bytes(name.encode())
    (source / "README.md").write_text("")
    torch_to_ms(source, tmp_path / "ms")
    assert sorted(os.listdir(tmp_path / "ms")) == sorted(extras + ["config.json", "model.safetensors"])
    ms_to_torch(tmp_path / "ms", tmp_path / "back")
    for name in extras:
        assert (tmp_path / "back" / name).read_bytes() == name.encode()


def test_an_older_conversion_is_replaced(tmp_path, make_official, write_official, load_official,
                                         canonical_of, bits):
    sources = [make_official(model, seed=seed) for seed, model in enumerate(MODELS)]
    for number, (config, state) in enumerate(sources):
        torch_to_ms(write_official(config, state, name=str(number)), tmp_path / "ms")
        assert_holds(tmp_path / "ms", canonical_of(config, state), bits)
        ms_to_torch(tmp_path / "ms", tmp_path / "back", max_shard_bytes=20_000 * (number + 1))
        back = load_official(tmp_path / "back")
        assert set(back) == set(state)
        index = json.loads((tmp_path / "back/pytorch_model.bin.index.json").read_text())
        files = {path.name for path in (tmp_path / "back").glob("*.bin")}
        assert files == set(index["weight_map"].values())
    with pytest.raises(InputError, match="back already holds pytorch_model"):
        ms_to_torch(tmp_path / "ms", tmp_path / "back", format="safetensors")
    torch_to_ms(tmp_path / "0", tmp_path / "another")
    with pytest.raises(InputError, match="another already holds model.safetensors"):
        ms_to_torch(tmp_path / "ms", tmp_path / "another")
