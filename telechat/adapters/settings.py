"""``adapter_config.json``: what of it changes a result, and is read or refused; keys that do not are ignored."""

import re

from telechat import fields
from telechat.errors import InputError
from telechat.text_files import read_json_object

# What would change the result and is not supported, with the values that ask for nothing besides null.
_PLAIN = {"use_dora": (False,), "lora_bias": (False,), "use_qalora": (False,), "layer_replication": ([],),
          "trainable_token_indices": ([], {}), "target_parameters": ([],), "alora_invocation_tokens": ([],),
          "arrow_config": (), "kasa_config": (), "monteclora_config": (), "use_bdlora": (False,),
          "use_qa_lora": (False,), "use_merged_linear": (False,)}  # the last two are ms-swift's
# Ways to begin an adapter that leave the model's weights as they are; others (PiSSA, OLoRA, CorDA, LoRA-GA, LoftQ) change them, too.
_BEGINNINGS = ("none", "true", "false", "gaussian", "eva", "orthogonal", "mica")


def read_settings(path):
    """Of a LoRA adapter: r, lora_alpha, use_rslora, rank_pattern, alpha_pattern, modules_to_save.

    Args:
        path (str): of the file.

    Returns:
        dict: of these keys, ensure_weight_tying and lora_dropout, which is as it stands there; patterns are dicts, and
        modules_to_save is a list of str.

    Raises:
        InputError: names the file and the key of what is wrong or not supported.
    """
    values = read_json_object(path, "copy the adapter again")
    try:
        kind = values.get("peft_type") or values.get("swift_type")
        if kind != "LORA":
            raise InputError(f"peft_type must be LORA, not {fields.shown(kind)}; merge it with the peft package instead")
        for name, plain in _PLAIN.items():
            if values.get(name) not in (None, *plain):
                raise InputError(f"{name} {fields.shown(values[name])} is not supported; merge it with the peft package "
                                 "and give the merged model")
        begun = values.get("init_lora_weights")
        if str(begun).lower() not in _BEGINNINGS:
            raise InputError(f"init_lora_weights {fields.shown(begun)} changed the model's own weights before training; save the "
                             "adapter with peft's path_initial_model_for_weight_conversion, or merge it with the peft package "
                             "and give the merged model")
        whole = values.get("modules_to_save") or []
        if not isinstance(whole, list) or not all(isinstance(name, str) for name in whole):
            raise InputError(f"modules_to_save must be a list of module names, not {fields.shown(whole)}")
        settings = {"r": fields.whole_number("r", values.get("r"), 1, 2 ** 16),
                    "lora_alpha": fields.real_number("lora_alpha", values.get("lora_alpha"), above=0),
                    "use_rslora": fields.flag("use_rslora", values.get("use_rslora"), False),
                    "ensure_weight_tying": fields.flag("ensure_weight_tying", values.get("ensure_weight_tying"), False),
                    "modules_to_save": whole, "lora_dropout": values.get("lora_dropout")}
        for name, read, bounds in (("rank_pattern", fields.whole_number, {"least": 1}),
                                   ("alpha_pattern", fields.real_number, {"above": 0})):
            given = values.get(name) or {}
            if not isinstance(given, dict):
                raise InputError(f"{name} must be an object, not {fields.shown(given)}")
            settings[name] = {_checked(key, name): read(f"{name}.{key}", value, **bounds) for key, value in given.items()}
        return settings
    except InputError as error:
        raise InputError(f"{path}: {error}") from None


def _checked(pattern, name):
    try:
        re.compile(pattern)
    except re.error:
        raise InputError(f"{name} holds {fields.shown(pattern)}, which is no pattern of module names") from None
    return pattern
