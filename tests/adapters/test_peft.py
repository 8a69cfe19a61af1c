"""LoRA adapters that peft saved, against what peft computes with them on the official code."""

import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from telechat import Generator, InputError, SamplingParams, TeleChat
from telechat.adapters.peft import AdaptedReader, Adapter
from telechat.checkpoint.convert import merge_lora, torch_to_ms
from telechat.checkpoint.reader import CheckpointReader
from tests.conftest import MODELS

# Official module → shape of its (out, in) product in each style, for adapters made here.
TARGETS = {"telechat": ("self_attention.query", "self_attention.key_value", "mlp.down_proj"),
           "gpt2": ("attn.c_attn", "mlp.c_fc", "mlp.c_proj"), "llama": ("self_attn.q_proj", "self_attn.v_proj", "mlp.up_proj")}


@pytest.fixture(scope="module")
def base(shared, tmp_path_factory):
    directory = tmp_path_factory.mktemp("lora") / "12b"
    torch_to_ms(shared / "reference/telechat_12b_tiny", directory)
    return directory


@pytest.mark.parametrize("name", ["a", "b"])
def test_official_logits_tokens_and_merged_weights(shared, base, tmp_path, name):
    golden = np.load(shared / "reference/lora_12b/golden.npz")
    adapter = shared / f"reference/lora_12b/adapter_{name}"
    model = TeleChat.from_pretrained(base, lora=adapter)
    scale = np.abs(golden[f"{name}_logits"]).max()
    assert np.abs(model(golden["input_ids"]).asnumpy() - golden[f"{name}_logits"]).max() < 1e-5 * scale
    prompts = golden["prompt_ids"]
    expected = golden[f"{name}_greedy_ids"]
    params = SamplingParams(max_new_tokens=expected.shape[1] - prompts.shape[1])
    answers = Generator(model, max_length=64, batch_size=2).generate(prompts.tolist(), params)
    assert [[*prompt, *answer] for prompt, answer in zip(prompts.tolist(), answers)] == expected.tolist()
    merge_lora(base, adapter, tmp_path / "merged")
    merged = CheckpointReader(tmp_path / "merged").read("transformer.h.0.self_attention.query.weight")
    assert np.abs(merged - golden[f"{name}_merged_query_0"]).max() < 1e-6
    assert np.abs(TeleChat.from_pretrained(tmp_path / "merged")(golden["input_ids"]).asnumpy()
                  - golden[f"{name}_merged_logits"]).max() < 1e-5 * scale


@pytest.mark.parametrize("model", MODELS)
def test_every_layout_against_its_own_products(shared, tmp_path, model):
    """W + s·B·A of every official tensor, put together in float64, and brought to our layout by the converter."""
    official = shared / "reference" / f"{model}_tiny"
    torch_to_ms(official, tmp_path / "base")
    config = CheckpointReader(tmp_path / "base").config
    random = np.random.default_rng(0)
    changed, tensors = {}, {}
    shutil.copytree(official, tmp_path / "changed")
    for file in (*(tmp_path / "changed").glob("*.bin"), *(tmp_path / "changed").glob("*.safetensors")):
        state = _load(file)
        for name, weight in state.items():
            module = name.removesuffix(".weight")
            if not name.endswith(".weight") or not module.endswith(TARGETS[config.style]):
                continue
            outputs, inputs = weight.shape[::-1] if config.style == "gpt2" else weight.shape
            a, b = (random.standard_normal(shape).astype(np.float32) * 0.1 for shape in ((3, inputs), (outputs, 3)))
            full = module if module.startswith(("transformer.", "model.")) else f"transformer.{module}"
            tensors[f"base_model.model.{full}.lora_A.weight"], tensors[f"base_model.model.{full}.lora_B.weight"] = a, b
            delta = 2.0 * (b.astype(np.float64) @ a.astype(np.float64))
            state[name] = (weight.astype(np.float64) + (delta.T if config.style == "gpt2" else delta)).astype(weight.dtype)
            changed[module] = True
        _save(file, state)
    assert len(changed) == 3 * config.n_layer
    _write(tmp_path / "adapter", tensors, r=3, lora_alpha=6, target_modules=list(TARGETS[config.style]))
    torch_to_ms(tmp_path / "changed", tmp_path / "expected")
    expected, found = CheckpointReader(tmp_path / "expected"), AdaptedReader(tmp_path / "base", tmp_path / "adapter")
    assert found.names == expected.names
    for name in expected.names:
        step = 2 ** -7 if found.dtype(name).name == "bfloat16" else 1e-6
        apart = np.abs(found.read(name).astype(np.float64) - expected.read(name).astype(np.float64))
        assert apart.max() <= step * max(1.0, np.abs(expected.read(name).astype(np.float32)).max()), name
        half = tuple(slice(0, size // 2) for size in found.shape(name))
        assert np.array_equal(found.read(name, half), found.read(name)[half])


def _load(file):
    if file.suffix == ".safetensors":
        return load_file(file)
    import torch
    return {name: tensor.numpy() for name, tensor in torch.load(file, weights_only=True).items()}


def _save(file, state):
    if file.suffix == ".safetensors":
        return save_file(state, file)
    import torch
    return torch.save({name: torch.from_numpy(np.array(array)) for name, array in state.items()}, file)


def _write(folder, tensors, **settings):
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", **settings}))


def test_ranks_and_alphas_of_single_modules(shared, base, tmp_path):
    adapter = shared / "reference/lora_12b/adapter_a"
    config = CheckpointReader(base).config
    plain = Adapter(adapter, config)
    shutil.copytree(adapter, tmp_path / "other")
    values = json.loads((adapter / "adapter_config.json").read_text())
    values |= {"alpha_pattern": {"query": 32, "1.mlp.up_proj": 4}, "use_rslora": True}
    (tmp_path / "other/adapter_config.json").chmod(0o644)
    (tmp_path / "other/adapter_config.json").write_text(json.dumps(values))
    other = Adapter(tmp_path / "other", config)
    assert plain.scale("transformer.h.0.self_attention.query") == 2.0  # alpha 8, rank 4
    assert other.scale("transformer.h.0.self_attention.query") == 16.0
    assert other.scale("transformer.h.1.mlp.up_proj") == 2.0 and other.scale("transformer.h.0.mlp.up_proj") == 4.0
    name = "transformer.h.0.self_attention.query.weight"
    assert np.allclose(other.delta(name), 8 * plain.delta(name))


@pytest.mark.parametrize("change, said", [
    (dict(peft_type="LOHA"), "peft_type must be LORA, not 'LOHA'"),
    (dict(lora_alpha=0), "lora_alpha must be a number above 0, not 0"),
    (dict(r=0), "r must be a whole number from 1"),
    (dict(use_dora=True), "use_dora True is not supported"),
    (dict(modules_to_save=["lm_head"]), "holds no lm_head.weight, and its modules_to_save names lm_head"),
    (dict(init_lora_weights="pissa_niter_16"), "init_lora_weights 'pissa_niter_16' changed the model's own weights"),
    (dict(modules_to_save="lm_head"), "modules_to_save must be a list of module names, not 'lm_head'"),
    (dict(init_lora_weights="loftq"), "init_lora_weights 'loftq' changed the model's own weights"),
    (dict(alora_invocation_tokens=[5]), r"alora_invocation_tokens \[5\] is not supported"),
    (dict(target_parameters=["mlp.up_proj.weight"]), "target_parameters .* is not supported"),
    (dict(r=5), r"must be \(5, \d+\) for this model and rank 5"),
    (dict(rank_pattern=3), "rank_pattern must be an object, not 3"),
    (dict(alpha_pattern={"(": 1}), "which is no pattern of module names"),
])
def test_settings_that_do_not_fit_are_refused(shared, base, tmp_path, change, said):
    shutil.copytree(shared / "reference/lora_12b/adapter_a", tmp_path / "adapter")
    path = tmp_path / "adapter/adapter_config.json"
    path.chmod(0o644)
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(InputError, match=said):
        merge_lora(base, tmp_path / "adapter", tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize("tensors, said", [
    ({"base_model.model.transformer.h.9.mlp.up_proj.lora_A.weight": (2, 64)}, "changes transformer.h.9.mlp.up_proj, which the model"),
    ({"base_model.model.transformer.h.0.input_layernorm.lora_A.weight": (2, 64)}, "input_layernorm, which the model does not have"),
    ({"base_model.model.transformer.h.0.mlp.up_proj.lora_A.weight": (2, 63)}, r"is \(2, 63\) and must be \(2, 64\)"),
    ({"base_model.model.transformer.word_embeddings.lora_embedding_A": (2, 64)}, "which is no lora_A or lora_B of a product"),
])
def test_tensors_that_do_not_fit_are_refused(base, tmp_path, tensors, said):
    _write(tmp_path / "adapter", {name: np.zeros(shape, np.float32) for name, shape in tensors.items()}, r=2, lora_alpha=2)
    with pytest.raises(InputError, match=said):
        merge_lora(base, tmp_path / "adapter", tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_directories_that_are_no_adapter_are_refused(base, tmp_path):
    with pytest.raises(InputError, match="holds no adapter_config.json; give a directory that the peft package saved"):
        merge_lora(base, base, tmp_path / "merged")
    _write(tmp_path / "adapter", {}, r=2, lora_alpha=2)
    with pytest.raises(InputError, match="holds no lora_A and lora_B"):
        merge_lora(base, tmp_path / "adapter", tmp_path / "merged")
    (tmp_path / "adapter/adapter_model.safetensors").unlink()
    with pytest.raises(InputError, match="holds no adapter_model.safetensors"):
        merge_lora(base, tmp_path / "adapter", tmp_path / "merged")
