"""What the peft package saves with settings of many kinds is read as peft merges it; so are other programs' spellings of it."""

import json

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from safetensors.torch import save_file

from telechat import InputError, TeleChat, TeleChatConfig
from telechat.adapters.directory import lora_of
from telechat.adapters.peft import AdaptedReader, Adapter
from telechat.adapters.unmerged import AdapterSet
from telechat.checkpoint.convert import merge_lora
from telechat.checkpoint.layout import official_parameters
from tests.adapters.test_peft_package import SIZES, Official

ALL = ["query", "key_value", "dense", "gate_proj", "up_proj", "down_proj"]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A model in 12B's layout, biases and a head of its own included."""
    directory = tmp_path_factory.mktemp("base") / "model"
    TeleChat(TeleChatConfig(**SIZES, use_bias=True, tie_word_embeddings=False)).save_pretrained(directory)
    return directory


def peft_model(base, **settings):
    """The official modules with the model's weights and an adapter, all that it trains drawn anew."""
    peft = pytest.importorskip("peft")
    tensors = load_file(base / "model.safetensors")
    del tensors["transformer.word_embeddings.weight"]  # a Linear it is not
    model = peft.get_peft_model(Official(TeleChatConfig.from_pretrained(base), tensors),
                                peft.LoraConfig(task_type="CAUSAL_LM", **{"r": 3, "lora_alpha": 5, **settings}))
    torch.manual_seed(0)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.normal_(0, 0.2)
    return model


def assert_merged(base, adapter, model):
    """Every weight of the model with this adapter is what peft merges; returns the names of those that changed."""
    reader, changed = AdaptedReader(base, adapter), set()
    expected = {name: tensor.numpy() for name, tensor in model.merge_and_unload().state_dict().items()}
    before = load_file(base / "model.safetensors")
    for tensor in official_parameters(reader.config):
        if tensor.name not in expected:
            continue
        found = reader.read(tensor.name)
        assert np.abs(found - expected[tensor.name]).max() < 1e-6, tensor.name
        half = tuple(slice(0, size // 2) for size in tensor.shape)
        assert np.array_equal(reader.read(tensor.name, half), found[half])
        if not np.array_equal(found, before[tensor.name]):
            changed.add(tensor.name)
    return changed


@pytest.mark.parametrize("settings, safe, changed", [
    (dict(target_modules=r".*\.(query|up_proj)", use_rslora=True, init_lora_weights="gaussian"), True, 4),
    (dict(target_modules=ALL, layers_to_transform=[1], layers_pattern="h", exclude_modules=["dense"]), True, 5),
    (dict(target_modules=ALL, rank_pattern={"query": 2, r"h\.1\.mlp\..*": 4}, alpha_pattern={"dense": 9}), False, 12),
    (dict(target_modules=["query"], bias="all"), False, 6),
    (dict(target_modules=["dense"], bias="lora_only"), True, 4),
    (dict(target_modules=["query"], modules_to_save=["lm_head", "ln_f"]), True, 4),
], ids=["pattern", "some layers", "ranks, torch file", "all biases, torch file", "biases of targets", "head and norm"])
def test_merged_as_peft_merges(base, tmp_path, settings, safe, changed):
    model = peft_model(base, **settings)
    model.save_pretrained(tmp_path / "adapter", safe_serialization=safe)
    assert (tmp_path / "adapter/adapter_model.bin").exists() == (not safe)
    assert len(assert_merged(base, tmp_path / "adapter", model)) == changed


@pytest.fixture
def saved(base, tmp_path):
    """(adapter directory as peft saves it, the peft model)."""
    model = peft_model(base, target_modules=ALL)
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter", model


def rewrite(directory, change=lambda name, tensor: (name, tensor), **settings):
    """Change what an adapter's files hold."""
    tensors = {name: torch.tensor(array) for name, array in load_file(directory / "adapter_model.safetensors").items()}
    save_file(dict(change(name, tensor) for name, tensor in tensors.items()), directory / "adapter_model.safetensors")
    values = json.loads((directory / "adapter_config.json").read_text())
    (directory / "adapter_config.json").write_text(json.dumps({**values, **settings}))


def test_names_with_the_adapters_name_and_keys_that_nobody_knows(base, saved):
    """As of ``torch.save(model.state_dict())``; keys of newer versions and of other programs are ignored."""
    directory, model = saved
    rewrite(directory, lambda name, tensor: (name.replace(".weight", ".taught.weight"), tensor), peft_version="9.9", new_key={"a": 1},
            target_modules="all-linear", lora_dtype="fp32")
    assert len(assert_merged(base, directory, model)) == 12


def test_as_the_tuners_of_ms_swift_save_it(base, saved):
    directory, model = saved
    rewrite(directory, lambda name, tensor: (name.removeprefix("base_model.model.").replace(".weight", ".default.weight"), tensor),
            peft_type=None, swift_type="LORA", use_merged_linear=False)
    assert len(assert_merged(base, directory, model)) == 12


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_factors_of_16_bits(base, saved, dtype):
    directory, model = saved
    rewrite(directory, lambda name, tensor: (name, tensor.to(dtype)))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(dtype).float()
    assert len(assert_merged(base, directory, model)) == 12


def test_whole_tensors_are_merged_alone(base, tmp_path):
    """They cannot stay beside a model for some rows, nor are they trained on."""
    peft_model(base, target_modules=["query"], modules_to_save=["lm_head"]).save_pretrained(tmp_path / "adapter")
    config = TeleChatConfig.from_pretrained(base)
    adapter = Adapter(tmp_path / "adapter", config)
    with pytest.raises(InputError, match="changes lm_head, which lies outside the blocks; merge it"):
        AdapterSet({"one": adapter}, config, np.asarray)
    with pytest.raises(InputError, match="holds lm_head.weight as a whole, which cannot be trained on"):
        lora_of(adapter, config)


@pytest.mark.parametrize("change, said", [
    (lambda name, tensor: (name.replace("lora_A", "lora_embedding_A"), tensor), "lora_embedding_A.* no tensor of this model"),
    (lambda name, tensor: (name.replace("lora_B.weight", "lora_magnitude_vector"), tensor), "lora_magnitude_vector, which is no"),
    (lambda name, tensor: (name.replace("query.lora_A.weight", "query.lora_A.other.weight"), tensor), "tensors of several adapters"),
    (lambda name, tensor: (name.replace("1.mlp.up_proj.lora_B", "0.self_attention.dense.base_layer.lora_C"), tensor), "lora_C.*which is no"),
    (lambda name, tensor: (name.replace("query.lora_A.weight", "dense.base_layer.bias"), tensor), r"bias in .* is \(3, 32\) and must be"),
])
def test_tensors_of_other_kinds_are_refused(base, saved, tmp_path, change, said):
    rewrite(saved[0], change)
    with pytest.raises(InputError, match=said):
        merge_lora(base, saved[0], tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
