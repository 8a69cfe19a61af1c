"""Directories given by mistake: each is called what it is, by every tool that reads a checkpoint."""

import json
import re
import shutil

import numpy as np
import pytest
from safetensors.numpy import save_file

from telechat.checkpoint.convert import mindformers_to_ms, torch_to_ms
from telechat.checkpoint.reader import CheckpointReader
from telechat.config import TeleChatConfig
from telechat.data.tokenizer import Tokenizer
from telechat.errors import InputError

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 7516192768\n"
CONFIG = dict(vocab_size=56, hidden_size=48, n_layer=1, n_head=3, ffn_hidden_size=40)
LFS = "is a Git LFS pointer, a note of where the file is and not the file itself; fetch it with `git lfs pull`"
ADAPTER = "is a LoRA adapter (PEFT), the changes to a model and not the model; merge it into its base model first"
QUANTISED = "holds quantised weights ({}), which cannot be read; give the directory of the same model in float16"
GPTQ = "holds quantised weights (GPTQ), which only answer, are evaluated and have adapters trained beside them; give the directory of the same model in float16"
FAMILY = "is of another model family ({}), not of TeleChat; give the directory of a TeleChat-1, TeleChat2 or TeleChat3 model"
WEIGHTS = {"lm_head.weight": np.zeros((56, 48), "f4")}


def directory_with(path, files):
    """Files by name: bytes, a dict (JSON), or None for a folder."""
    for name, content in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        if content is None:
            (path / name).mkdir(exist_ok=True)
        elif content == "weights":
            save_file(WEIGHTS, path / name)
        else:
            (path / name).write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    return path


CASES = [
    *[({"config.json": CONFIG, name: POINTER}, f"{name} {LFS}") for name in
      ("model.safetensors", "model-00001-of-00002.safetensors", "pytorch_model.bin", "pytorch_model_00001-of-00002.bin",
       "tokenizer.model", "tokenizer.json", "generation_config.json", "pytorch_model.bin.index.json")],
    ({"config.json": POINTER}, f"config.json {LFS}"),
    ({"config.json": CONFIG, "model.safetensors": b"<!DOCTYPE html><html>"},
     "model.safetensors is a web page and not the file itself; download the file again"),
    ({"adapter_config.json": {"peft_type": "LORA"}, "adapter_model.safetensors": "weights"}, ADAPTER),
    ({"config.json": CONFIG, "adapter_config.json": {}, "adapter_model.bin": b""}, ADAPTER),
    *[({"config.json": {**CONFIG, "quantization_config": {"quant_method": method}}, "model.safetensors": "weights"},
       QUANTISED.format(name)) for method, name in (("awq", "AWQ"), ("bitsandbytes", "bitsandbytes"),
                                                    ("compressed-tensors", "compressed-tensors"), ("fp8", "fp8"))],
    ({"config.json": {**CONFIG, "quantization_config": {"load_in_4bit": True}}}, QUANTISED.format("bitsandbytes")),
    ({"config.json": {**CONFIG, "quantization_config": {"quant_method": ["gptq"]}}}, "holds quantised weights, which cannot"),
    ({"config.json": CONFIG, "quant_config.json": {"w_bit": 4}}, QUANTISED.format("AWQ")),
    ({"config.json": {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "hidden_size": 8}},
     FAMILY.format("qwen2, Qwen2ForCausalLM")),
    ({"config.json": {"architectures": ["LlamaForCausalLM"]}}, FAMILY.format("LlamaForCausalLM")),
    ({"telechat-7b-q4_k_m.gguf": b"GGUF"}, "holds GGUF weights (of llama.cpp), telechat-7b-q4_k_m.gguf; give the directory"),
    ({"config.json": CONFIG, "x.gguf": b"GGUF"}, "holds GGUF weights (of llama.cpp), x.gguf; give the directory"),
    ({"telechat_12b.ckpt": b"x", "run_telechat.yaml": b""},
     "holds a MindFormers checkpoint (.ckpt), telechat_12b.ckpt; convert the file once: tools/convert.py mindformers-to-ms"),
    ({"rank_0/checkpoint_0.ckpt": b"x", "rank_1/checkpoint_1.ckpt": b"x"},
     "holds a MindFormers checkpoint cut over 2 ranks; merge it with MindFormers' transform_checkpoint"),
    ({"checkpoint-000500": None, "checkpoint-001000": None, "final": None, "run.yaml": b""},
     "is the directory of a training run; give a checkpoint in it: {dir}/final"),
    ({"checkpoint-000900": None, "checkpoint-001000": None},
     "is the directory of a training run; give a checkpoint in it: {dir}/checkpoint-001000"),
    ({"global_step100/mp_rank_00_model_states.pt": b"x", "latest": b"x"}, "is a DeepSpeed checkpoint; make one file"),
    ({"refs/main": b"", "snapshots/0abc/config.json": CONFIG},
     "is a folder of Hugging Face's cache; give the model in it: {dir}/snapshots/0abc"),
]


@pytest.mark.parametrize("files, said", CASES, ids=range(len(CASES)))
def test_mistaken_directories(tmp_path, files, said):
    path = directory_with(tmp_path / "d", files)
    for read in (lambda: TeleChatConfig.from_pretrained(path), lambda: CheckpointReader(path),
                 lambda: torch_to_ms(path, tmp_path / "out")):
        with pytest.raises(InputError) as refused:
            read()
        message = str(refused.value)
        assert said.format("{}", dir=path) in message and str(path) in message and "weights_only" not in message
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("files", [
    {"config.json": {**CONFIG, "quantization_config": {"quant_method": "gptq"}}, "model.safetensors": "weights"},
    {"config.json": CONFIG, "quantize_config.json": {"bits": 4}, "gptq_model-4bit-128g.bin": b"x"}])
def test_gptq_where_it_is_of_no_use(tmp_path, files):
    path = directory_with(tmp_path / "d", files)
    for read in (TeleChatConfig.from_pretrained, CheckpointReader):
        with pytest.raises(InputError, match=re.escape(f"{path} {GPTQ}") + ".*--dequantize$"):
            read(path)


def test_the_published_directories_are_none_of_these(reference):
    assert TeleChatConfig.from_pretrained(reference.official) == TeleChatConfig.from_pretrained(reference.directory)


def test_what_lies_in_the_reference_material(shared, tmp_path):
    with pytest.raises(InputError) as refused:
        torch_to_ms(shared / "reference/lora_12b/adapter_a", tmp_path / "out")
    assert ADAPTER in str(refused.value)


@pytest.mark.parametrize("name, said", [
    ("transformer.h.0.self_attention.query.lora_A.weight", "holds a LoRA adapter that is not merged into its model"),
    ("transformer.h.0.self_attention.query.base_layer.weight", "holds a LoRA adapter that is not merged into its model"),
    ("transformer.h.0.mlp.up_proj.qweight", "holds quantised weights (GPTQ or AWQ)"),
    ("transformer.h.0.mlp.up_proj.weight_packed", "holds quantised weights (compressed-tensors)"),
    ("transformer.h.0.mlp.up_proj.weight.absmax", "holds quantised weights (bitsandbytes)"),
])
def test_weights_that_only_their_names_give_away(tmp_path, name, said):
    path = directory_with(tmp_path / "d", {"config.json": CONFIG})
    save_file({**WEIGHTS, name: np.zeros(3, "f4")}, path / "model.safetensors")
    with pytest.raises(InputError) as refused:
        torch_to_ms(path, tmp_path / "out")
    assert str(refused.value).startswith(f"{path} {said}")
    with pytest.raises(InputError) as refused:
        reader = CheckpointReader(path)
        reader.check({"lm_head.weight": (56, 48)})
    assert str(refused.value).startswith(f"{path} {said}")


def test_pointers_are_named_wherever_a_file_is_given(tmp_path):
    pointer = tmp_path / "tokenizer.model"
    pointer.write_bytes(POINTER)
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    for read in (lambda: Tokenizer.from_pretrained(pointer), lambda: Tokenizer.from_pretrained(tmp_path),
                 lambda: mindformers_to_ms(pointer, tmp_path / "config.json", tmp_path / "out")):
        with pytest.raises(InputError) as refused:
            read()
        assert f"{pointer} {LFS}" in str(refused.value)


def test_a_file_of_weights_is_no_directory(tmp_path):
    save_file(WEIGHTS, tmp_path / "model.safetensors")
    with pytest.raises(InputError, match="model.safetensors is a file; give the checkpoint directory, which holds"):
        TeleChatConfig.from_pretrained(tmp_path / "model.safetensors")


def test_mindformers_files_may_lie_beside_the_config(tmp_path):
    directory_with(tmp_path, {"config.json": CONFIG, "m.ckpt": b"x"})
    with pytest.raises(InputError, match="m.ckpt cannot be read as a MindSpore checkpoint"):
        mindformers_to_ms(tmp_path / "m.ckpt", tmp_path, tmp_path / "out")


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "base_model.model.", "model.", "module._orig_mod."])
def test_wrapped_names_are_read_and_a_line_says_so(reference, tmp_path, capsys, prefix):
    from safetensors.numpy import load_file

    wrapped = tmp_path / "wrapped"
    shutil.copytree(reference.directory, wrapped)
    tensors = load_file(wrapped / "model.safetensors")
    save_file({prefix + name: tensor for name, tensor in tensors.items()}, wrapped / "model.safetensors")
    line = f"{wrapped}: names of tensors begin with {prefix}, left by a wrapper of the model; read without it\n"
    reader = CheckpointReader(wrapped)
    assert capsys.readouterr().err == line
    assert all(np.array_equal(reader.read(name), tensor) for name, tensor in tensors.items())
    torch_to_ms(wrapped, tmp_path / "out")
    assert line in capsys.readouterr().err
    converted = load_file(tmp_path / "out" / "model.safetensors")
    assert converted.keys() == tensors.keys()
    assert all(np.array_equal(converted[name], tensors[name]) for name in tensors)


def test_wrapped_published_names_are_converted(reference, tmp_path, capsys):
    import torch
    from safetensors.numpy import load_file

    wrapped = tmp_path / "wrapped"
    shutil.copytree(reference.official, wrapped)
    for file in wrapped.glob("*.bin"):
        torch.save({"module." + name: tensor for name, tensor in torch.load(file, weights_only=True).items()}, file)
    for file in wrapped.glob("*.safetensors"):
        save_file({"module." + name: tensor for name, tensor in load_file(file).items()}, file)
    for index in wrapped.glob("*.safetensors.index.json"):
        index.unlink()  # it says the names without the prefix
    torch_to_ms(wrapped, tmp_path / "out")
    assert "names of tensors begin with module., left by" in capsys.readouterr().err
    converted, tensors = (load_file(path / "model.safetensors") for path in (tmp_path / "out", reference.directory))
    assert converted.keys() == tensors.keys() and all(np.array_equal(converted[name], tensors[name]) for name in tensors)
