"""Directories that are given by mistake: what they are, and what to give instead.

The one place that knows the files of other programs. It looks at names and at the first bytes, never at weights.
"""

import os
import re
import shlex

from telechat.errors import InputError
from telechat.text_files import refuse_placeholder_file

_WEIGHTS = re.compile(r"(pytorch_model|model)([_-].*)?\.(bin|safetensors)(\.index\.json)?")
_CHECKPOINT = re.compile(r"checkpoint-\d+")
_QUANTISED_FILES = {"quantize_config.json": "GPTQ", "quant_config.json": "AWQ"}
_METHODS = {"gptq": "GPTQ", "awq": "AWQ", "bitsandbytes": "bitsandbytes", "compressed-tensors": "compressed-tensors"}
_SMALL_FILES = re.compile(r"(config|generation_config|tokenizer|tokenizer_config)\.(json|model)|tokenizer\.model")


def refuse_foreign_directory(directory, quantised=False):
    """Raise InputError where a directory holds something else than a TeleChat model that can be read.

    Recognised are Git LFS pointers and web pages in place of files, adapters (PEFT), training runs (of ours, of
    transformers and DeepSpeed), quantised weights, GGUF, MindFormers' files, and a Hugging Face cache. A directory that
    is none of these passes, whatever it holds.

    Args:
        directory (str): one that exists.
        quantised (bool): whether weights of GPTQ are what is wanted.
    """
    try:
        names = sorted(os.listdir(directory))
    except OSError as error:
        raise InputError(f"{directory} cannot be read ({error.strerror}); give a checkpoint directory") from None
    weights = [name for name in names if _WEIGHTS.fullmatch(name)]
    for name in names:
        if name in weights or _SMALL_FILES.fullmatch(name):
            refuse_placeholder_file(os.path.join(directory, name))
    if not weights and any(name.startswith("adapter_model.") or name == "adapter_config.json" for name in names):
        raise InputError(f"{directory} is a LoRA adapter (PEFT), the changes to a model and not the model; merge it into "
                         "its base model first (tools/convert.py merge-lora), or give it with --lora beside the base model")
    if "config.json" not in names:
        _refuse_without_config(directory, names)
    for name, method in _QUANTISED_FILES.items():
        if name in names and not (quantised and method == "GPTQ"):
            _refuse_quantised(directory, method)
    for ending, described in ((".gguf", "GGUF weights (of llama.cpp)"), (".ckpt", "a MindFormers checkpoint (.ckpt)")):
        found = [name for name in names if name.endswith(ending)]
        if found and not weights:
            raise InputError(f"{directory} holds {described}, {found[0]}; {_INSTEAD[ending]}")


_INSTEAD = {
    ".gguf": "give the directory of the published weights (.bin or .safetensors), which GGUF was made from",
    ".ckpt": "convert the file once: tools/convert.py mindformers-to-ms --checkpoint FILE",
}


def _refuse_without_config(directory, names):
    checkpoints = [name for name in names if _CHECKPOINT.fullmatch(name)]
    if checkpoints or "final" in names:
        model = "final" if "final" in names else max(checkpoints, key=lambda name: int(name[11:]))
        raise InputError(f"{directory} is the directory of a training run; give a checkpoint in it: "
                         f"{shlex.quote(os.path.join(directory, model))}")
    if os.path.isdir(os.path.join(directory, "snapshots")):
        found = sorted(os.listdir(os.path.join(directory, "snapshots"))) or ["…"]
        raise InputError(f"{directory} is a folder of Hugging Face's cache; give the model in it: "
                         f"{shlex.quote(os.path.join(directory, 'snapshots', found[-1]))}")
    if any(re.fullmatch(r"global_step\d+", name) for name in names):
        raise InputError(f"{directory} is a DeepSpeed checkpoint; make one file of weights of it with the zero_to_fp32.py "
                         "that DeepSpeed put there, and give a directory with that file and config.json")
    ranks = [name for name in names if re.fullmatch(r"rank_\d+", name)
             and any(file.endswith((".ckpt", ".safetensors")) for file in _listed(os.path.join(directory, name)))]
    if ranks:
        raise InputError(f"{directory} holds a MindFormers checkpoint cut over {len(ranks)} ranks; merge it with "
                         "MindFormers' transform_checkpoint, then convert the whole file: "
                         "tools/convert.py mindformers-to-ms --checkpoint FILE")


def _listed(directory):
    return os.listdir(directory) if os.path.isdir(directory) else []


def refuse_foreign_config(path, values, quantised=False):
    """Raise InputError where the content of a ``config.json`` is that of another model family, or of quantised weights.

    Args:
        path (str): of the file.
        values (dict): its content.
        quantised (bool): whether weights of GPTQ are what is wanted.
    """
    kind, classes = values.get("model_type"), values.get("architectures")
    name = classes[0] if isinstance(classes, list) and classes and isinstance(classes[0], str) else None
    said = [text for text in (kind, name) if isinstance(text, str) and text]
    if said and not any(text.lower().startswith("telechat") for text in said):
        raise InputError(f"{path} is of another model family ({', '.join(said)[:80]}), not of TeleChat; "
                         "give the directory of a TeleChat-1, TeleChat2 or TeleChat3 model")
    settings = values.get("quantization_config") or values.get("quantization")
    if settings and not (quantised and isinstance(settings, dict) and settings.get("quant_method") == "gptq"):
        method = settings.get("quant_method") if isinstance(settings, dict) else None
        method = method if isinstance(method, str) else None
        if method is None and isinstance(settings, dict) and any(name.startswith(("load_in_", "bnb_")) for name in settings):
            method = "bitsandbytes"
        _refuse_quantised(os.path.dirname(path) or ".", _METHODS.get(method, (method or "")[:40]))


def _refuse_quantised(directory, method):
    ours = method == "GPTQ"
    raise InputError(f"{directory} holds quantised weights{' (' + method + ')' if method else ''}, "
                     f"which {'only answer, are evaluated and have adapters trained beside them' if ours else 'cannot be read'}; "
                     "give the directory of the same model in float16, bfloat16 or float32"
                     + (", or make one of these: tools/convert.py torch-to-ms --dequantize" if ours else ""))


def refuse_foreign_names(directory, names):
    """Raise InputError where tensors' names are those of quantised weights or of an adapter that is not merged."""
    for name in names:
        if ".lora_A." in name or ".lora_B." in name or ".base_layer." in name:
            raise InputError(f"{directory} holds a LoRA adapter that is not merged into its model ({name}); merge it first "
                             "(in PEFT: merge_and_unload, then save_pretrained) and give that directory")
        if name.endswith((".qweight", ".qzeros")):
            _refuse_quantised(directory, "GPTQ or AWQ")
        if name.endswith((".weight_packed", ".weight_scale")):
            _refuse_quantised(directory, "compressed-tensors")
        if ".absmax" in name or ".quant_state." in name or name.endswith(".SCB"):
            _refuse_quantised(directory, "bitsandbytes")
