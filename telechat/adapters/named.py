"""What ``--lora`` says: one adapter that is added to the weights (quantised ones it stays beside), or several by name that
stay beside them and answer where they are asked for."""

import re

from telechat.adapters.peft import Adapter
from telechat.adapters.unmerged import check_beside
from telechat.errors import InputError
from telechat.quantization.checkpoint import settings_of
from telechat.text_files import expand_path

_NAMED = re.compile(r"([^/=]+)=(.+)")


def read_lora(values, model_name):
    """(directory of the one to be added or None, {name: directory} of the others) of all ``--lora`` of a command line.

    Args:
        values (list of str): "DIR", or "name=DIR" each.
        model_name (str): what the base model is called.

    Raises:
        InputError: both kinds, a name that is there twice, or several to be added.
    """
    named, merged = {}, []
    for value in values:
        found = _NAMED.fullmatch(value)
        if not found:
            merged.append(expand_path(value))
        elif found[1] in (model_name, *named):
            raise InputError(f"--lora {value}: {found[1]!r} is the name of another model here; give each one of its own")
        else:
            named[found[1]] = expand_path(found[2])
    if len(merged) > 1 or (merged and named):
        raise InputError(f"--lora {merged[0]} is added to the weights, which goes with one adapter alone; give each a name: "
                         f"--lora name={merged[0]}")
    return (merged or [None])[0], named


def open_adapters(named, config):
    """{name: `Adapter`} of {name: directory}; InputError where one does not fit the model."""
    return {name: Adapter(directory, config) for name, directory in named.items()}


def attached_bytes(lora, config):
    """Bytes of the adapter of the directory ``lora`` where it stays beside quantised weights; 0 where it is added to them."""
    if lora is None or settings_of(config) is None:
        return 0
    return factor_bytes({lora: Adapter(lora, config)}, config)


def factor_bytes(adapters, config):
    """Most bytes that the factors of some adapters take beside a model, in float32.

    Raises:
        InputError: as `check_beside`, before a model is loaded in vain.
    """
    for adapter in adapters.values():
        check_beside(adapter, config)
    inner, hidden = config.ffn_hidden_size, config.hidden_size
    heads, keys = config.n_head * config.head_dim, 2 * config.num_key_value_heads * config.head_dim
    sides = 3 * (hidden + inner) + 2 * (hidden + heads) + hidden + keys
    return 4 * config.n_layer * sides * sum(adapter.largest_rank for adapter in adapters.values())
