"""What the peft package saves with settings of many kinds is read as peft merges it; so are other programs' spellings of it."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from safetensors.numpy import save_file as numpy_save_file
from safetensors.torch import save_file

from telechat import InputError, TeleChat, TeleChatConfig
from telechat.adapters.directory import lora_of
from telechat.adapters.named import factor_bytes
from telechat.adapters.peft import AdaptedReader, Adapter
from telechat.adapters.unmerged import AdapterSet
from telechat.checkpoint.convert import merge_lora
from telechat.checkpoint.layout import official_parameters
from telechat.checkpoint.reader import CheckpointReader
from tests.adapter_files import write_adapter
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
    (dict(target_modules=["query"], modules_to_save=["mlp", "layernorm", "score"]), True, 14),
    (dict(target_modules=["query"], init_lora_weights="mica"), True, 2),
], ids=["pattern", "some layers", "ranks, torch file", "all biases, torch file", "biases of targets", "head and norm",
        "parts of a layer, ends of names and one that is not there", "B not trained"])
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


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_factors_of_other_dtypes(base, saved, dtype):
    directory, model = saved
    rewrite(directory, lambda name, tensor: (name, tensor.to(dtype)))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(dtype).float()
    assert len(assert_merged(base, directory, model)) == 12


def test_factors_of_8_bits_are_refused(base, saved):
    rewrite(saved[0], lambda name, tensor: (name, tensor.to(torch.float8_e4m3fn)))
    with pytest.raises(InputError, match="holds tensors that are not float32, float16, bfloat16: .*lora_A.weight is F8_E4M3"):
        AdaptedReader(base, saved[0])


@pytest.mark.parametrize("settings, changed", [
    (dict(modules_to_save=["lm_head"]), "lm_head, which lies outside the blocks"),
    (dict(modules_to_save=["dense"]), "transformer.h.0.self_attention.dense.bias, which was trained whole"),
    (dict(modules_to_save=["up_proj"]), "transformer.h.0.mlp.up_proj, which was trained whole"),
], ids=["head", "product and bias", "product"])
def test_whole_tensors_are_merged_alone(base, tmp_path, settings, changed):
    """They cannot stay beside a model for some rows, which shows before the model is loaded, nor are they trained on."""
    peft_model(base, target_modules=["query"], **settings).save_pretrained(tmp_path / "adapter")
    config = TeleChatConfig.from_pretrained(base)
    adapter = Adapter(tmp_path / "adapter", config)
    for refused in (lambda: AdapterSet({"one": adapter}, config, np.asarray), lambda: factor_bytes({"one": adapter}, config)):
        with pytest.raises(InputError, match=f"changes {changed}; merge it"):
            refused()
    with pytest.raises(InputError, match="as a whole, which cannot be trained on"):
        lora_of(adapter, config)


def test_one_rank_that_a_pattern_gives_can_be_trained_on(base, tmp_path):
    peft_model(base, target_modules=["query"], rank_pattern={"query": 2}).save_pretrained(tmp_path / "adapter")
    config = TeleChatConfig.from_pretrained(base)
    assert lora_of(Adapter(tmp_path / "adapter", config), config).rank == 2
    rewrite(tmp_path / "adapter", lora_dropout=1.5)
    with pytest.raises(InputError, match=r"adapter_config.json: lora_dropout must be a number at least 0 and below 1, not 1.5"):
        lora_of(Adapter(tmp_path / "adapter", config), config)
    peft_model(base, target_modules=["query"], alpha_pattern={"h.1.*query": 2}).save_pretrained(tmp_path / "adapter")
    with pytest.raises(InputError, match="has a rank or alpha of its own for some modules"):
        lora_of(Adapter(tmp_path / "adapter", config), config)


LLAMA = TeleChatConfig(**SIZES, style="llama", use_bias=False, num_key_value_heads=2, tie_word_embeddings=True)


@pytest.fixture(scope="module")
def tied(tmp_path_factory):
    """A model in TeleChat3's layout whose head is its embedding."""
    directory = tmp_path_factory.mktemp("tied") / "model"
    TeleChat(LLAMA).save_pretrained(directory)
    return directory


def test_keys_trained_whole_beside_values_with_an_adapter(tied, tmp_path):
    peft = pytest.importorskip("peft")
    before = CheckpointReader(tied)
    official = {tensor.name: np.ascontiguousarray(tensor.join(*map(before.read, tensor.parameters)))
                for tensor in official_parameters(LLAMA) if "embed" not in tensor.name}
    model = peft.get_peft_model(Official(LLAMA, official), peft.LoraConfig(
        task_type="CAUSAL_LM", r=3, lora_alpha=5, target_modules=["v_proj"], modules_to_save=["k_proj"]))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.normal_(0, 0.2)
    model.save_pretrained(tmp_path / "adapter")
    merged, reader = model.merge_and_unload().state_dict(), AdaptedReader(tied, tmp_path / "adapter")
    for tensor in official_parameters(LLAMA):
        if "self_attn" in tensor.name:
            found = tensor.join(*map(reader.read, tensor.parameters))
            assert np.abs(found - merged[tensor.name].numpy()).max() < 1e-6, tensor.name
            assert np.array_equal(found, official[tensor.name]) != tensor.name.endswith(("k_proj.weight", "v_proj.weight"))


@pytest.mark.parametrize("own, settings, said", [
    (("embed_tokens",), {}, "holds an embedding of its own, and this model's embedding and head are one"),
    (("embed_tokens",), dict(ensure_weight_tying=True), None),
    (("lm_head",), {}, "holds a head of its own"),
    (("embed_tokens", "lm_head"), {}, "holds an embedding of its own"),
    (("embed_tokens", "same head"), {}, None),
], ids=str)
def test_an_embedding_that_is_the_head_too(tied, tmp_path, own, settings, said):
    """peft gives the head the new embedding with ensure_weight_tying alone; with save_embedding_layers it saves both, equal."""
    write_adapter(tmp_path / "adapter", LLAMA, 2, ["q_proj"])
    random, names = np.random.default_rng(0), {"embed_tokens": "model.embed_tokens", "lm_head": "lm_head", "same head": "lm_head"}
    tensors = load_file(tmp_path / "adapter/adapter_model.safetensors")
    for name in own:
        value = random.standard_normal((96, 32)).astype(np.float32) if name != "same head" else embedding
        embedding = tensors[f"base_model.model.{names[name]}.weight"] = value
    numpy_save_file(tensors, tmp_path / "adapter/adapter_model.safetensors")
    rewrite(tmp_path / "adapter", **settings)
    if said is None:
        assert np.array_equal(AdaptedReader(tied, tmp_path / "adapter").read("transformer.word_embeddings.weight"), embedding)
        return
    with pytest.raises(InputError, match=said):
        AdaptedReader(tied, tmp_path / "adapter")


def test_an_adapter_of_a_head_that_is_the_embedding_too(tied, tmp_path):
    untied = dataclasses.replace(LLAMA, tie_word_embeddings=False)
    write_adapter(tmp_path / "adapter", untied, 2, ["q_proj", "lm_head"])
    assert "lm_head.weight" in Adapter(tmp_path / "adapter", untied).parameters
    with pytest.raises(InputError, match="changes lm_head and not the embedding, which are one in this model"):
        Adapter(tmp_path / "adapter", LLAMA)


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
