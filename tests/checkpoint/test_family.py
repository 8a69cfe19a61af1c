"""TeleChat2's and TeleChat3's files: names of the published index, and there and back bit for bit."""

import json
import math
import re

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

from telechat.checkpoint.convert import ms_to_torch, torch_to_ms
from telechat.checkpoint.layout import official_parameters, parameter_shapes
from telechat.checkpoint.reader import CheckpointReader
from telechat.config import TeleChatConfig
from telechat.errors import InputError
from telechat.training.run_config import RunConfig
from tests.conftest import ROOT

TINY = ("telechat2_tiny", "telechat2_mha_tiny", "telechat3_tiny")
SIZES = dict(vocab=44, hidden=24, heads=6, kv=3, dim=10, inner=20, layers=2)


def read(directory):
    """Name → (dtype, shape, bytes) of all safetensors of a directory."""
    tensors = {}
    for file in sorted(directory.glob("*.safetensors")):
        with safe_open(file, "np") as opened:
            for name in opened.keys():
                array = opened.get_tensor(name)
                tensors[name] = (str(array.dtype), array.shape, array.tobytes())
    return tensors


def test_names_and_sizes_of_the_published_index(shared):
    config = TeleChatConfig.from_pretrained(shared / "data/telechat2_115b.config.json")
    index = json.loads((shared / "data/telechat2_115b.model.safetensors.index.json").read_text())
    tensors = official_parameters(config)
    assert {tensor.name for tensor in tensors} == set(index["weight_map"]) == set(parameter_shapes(config))
    assert 4 * sum(math.prod(tensor.shape) for tensor in tensors) == index["metadata"]["total_size"]  # float32


def test_telechat_1b_has_the_names_of_12b(shared):
    """Those of the published 12B's first 16 layers, at its own sizes; its heads are 64 wide."""
    config = TeleChatConfig.from_dict(RunConfig.load(ROOT / "configs/finetune_1b.yaml").published_model)
    index = json.loads((shared / "data/telechat_12b.pytorch_model.bin.index.json").read_text())
    expected = {name for name in index["weight_map"] if not (layer := re.search(r"\.h\.(\d+)\.", name)) or int(layer[1]) < 16}
    tensors = {tensor.name: tensor.shape for tensor in official_parameters(config)}
    assert set(tensors) == expected
    assert tensors["transformer.h.15.self_attention.key_value.weight"] == (4096, 2048) and config.head_dim == 64
    assert tensors["transformer.h.0.mlp.down_proj.weight"] == (2048, 5460)


@pytest.mark.parametrize("tiny", TINY)
def test_reference_there_and_back(shared, tmp_path, tiny):
    official = shared / "reference" / tiny
    torch_to_ms(official, tmp_path / "ms", model_name=tiny.split("_")[0])
    CheckpointReader(tmp_path / "ms").check(parameter_shapes(TeleChatConfig.from_pretrained(official)))
    ms_to_torch(tmp_path / "ms", tmp_path / "back", format="safetensors", max_shard_bytes=100_000)
    assert len(list((tmp_path / "back").glob("model-*.safetensors"))) > 1
    assert read(tmp_path / "back") == read(official)
    assert json.loads((tmp_path / "back/config.json").read_text()) == json.loads((official / "config.json").read_text())


@pytest.fixture
def llama(tmp_path):
    """A random checkpoint in Llama's layout, head_dim not hidden / heads, keys and values in different shards."""
    s, random = SIZES, np.random.default_rng(0)
    shapes = {"model.embed_tokens.weight": (s["vocab"], s["hidden"]), "model.norm.weight": (s["hidden"],),
              "lm_head.weight": (s["vocab"], s["hidden"])}
    for layer in range(s["layers"]):
        shapes.update({f"model.layers.{layer}.{name}.weight": shape for name, shape in {
            "self_attn.q_proj": (s["heads"] * s["dim"], s["hidden"]), "self_attn.k_proj": (s["kv"] * s["dim"], s["hidden"]),
            "self_attn.v_proj": (s["kv"] * s["dim"], s["hidden"]), "self_attn.o_proj": (s["hidden"], s["heads"] * s["dim"]),
            "mlp.gate_proj": (s["inner"], s["hidden"]), "mlp.up_proj": (s["inner"], s["hidden"]),
            "mlp.down_proj": (s["hidden"], s["inner"]), "input_layernorm": (s["hidden"],),
            "post_attention_layernorm": (s["hidden"],)}.items()})
    tensors = {name: random.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    folder = tmp_path / "llama"
    folder.mkdir()
    values = [name for name in tensors if "v_proj" in name]
    parts = [values, [name for name in tensors if name not in values]]
    for number, names in enumerate(parts, start=1):
        save_file({name: tensors[name] for name in names}, folder / f"model-{number:05d}-of-00002.safetensors")
    (folder / "config.json").write_text(json.dumps(dict(
        model_type="telechat3", vocab_size=s["vocab"], hidden_size=s["hidden"], num_hidden_layers=s["layers"],
        num_attention_heads=s["heads"], num_key_value_heads=s["kv"], head_dim=s["dim"], intermediate_size=s["inner"],
        rms_norm_eps=1e-5, rope_theta=1e4, max_position_embeddings=64, tie_word_embeddings=False)))
    return folder, tensors


def test_keys_and_values_go_head_by_head(llama, tmp_path):
    folder, tensors = llama
    torch_to_ms(folder, tmp_path / "ms")
    reader, dim = CheckpointReader(tmp_path / "ms"), SIZES["dim"]
    for layer in range(SIZES["layers"]):
        key_value = reader.read(f"transformer.h.{layer}.self_attention.key_value.weight")
        for head in range(SIZES["kv"]):
            for place, part in enumerate("kv"):
                rows = slice((2 * head + place) * dim, (2 * head + place + 1) * dim)
                theirs = tensors[f"model.layers.{layer}.self_attn.{part}_proj.weight"][head * dim:(head + 1) * dim]
                assert np.array_equal(key_value[rows], theirs)
        assert np.array_equal(reader.read(f"transformer.h.{layer}.self_attention.dense.weight"),
                              tensors[f"model.layers.{layer}.self_attn.o_proj.weight"])
    ms_to_torch(tmp_path / "ms", tmp_path / "back", format="safetensors")
    assert read(tmp_path / "back") == read(folder)


def test_telechat3_with_a_repeated_head(llama, tmp_path):
    """As torch saves a tied model: the head is the embedding once more. One that differs is not passed over."""
    folder, tensors = llama
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    with pytest.raises(InputError, match="1 not expected: lm_head.weight"):
        torch_to_ms(folder, tmp_path / "ms")
    part = folder / "model-00002-of-00002.safetensors"
    names = read(folder).keys() - {name for name in tensors if "v_proj" in name}
    save_file({name: tensors["model.embed_tokens.weight" if name == "lm_head.weight" else name] for name in names}, part)
    torch_to_ms(folder, tmp_path / "ms")
    assert np.array_equal(CheckpointReader(tmp_path / "ms").read("transformer.word_embeddings.weight"),
                          tensors["model.embed_tokens.weight"])
