"""TeleChatConfig: what a model is, read from and written as a published ``config.json``.

The files of TeleChat-1 (7B, 12B) and TeleChat2 share one style; 52B's has GPT-2's names and TeleChat3's
has Llama's. All are read into the same fields, named as in the 12B file, and written back in the style they
came in.
"""

import dataclasses
import os

from telechat import fields
from telechat.errors import InputError
from telechat.foreign import refuse_foreign_config, refuse_foreign_directory
from telechat.text_files import read_json_object
from telechat.yarn import YarnScaling, json_object

# Style → name in a file of that style → field, where the two differ. What has no counterpart is kept in `extra`
# and written back untouched.
_TELECHAT_NAMES = {"base_seqlen": "rotary_ntk_context"}
_GPT2_NAMES = {
    "n_embd": "hidden_size",
    "n_inner": "ffn_hidden_size",
    "n_positions": "training_seqlen",
    "attn_pdrop": "attention_dropout",
    "resid_pdrop": "hidden_dropout",
    "embd_pdrop": "embedding_dropout",
    "rotary_theta": "rotary_base",
    "add_bias_linear": "use_bias",
    "input_mult": "input_mult",
    "output_mult": "output_mult",
    "mup_scale_factor": "mup_scale_factor",
}
_LLAMA_NAMES = {
    "num_hidden_layers": "n_layer",
    "num_attention_heads": "n_head",
    "intermediate_size": "ffn_hidden_size",
    "rms_norm_eps": "layer_norm_epsilon",
    "max_position_embeddings": "training_seqlen",
    "rope_theta": "rotary_base",
    "rope_scaling": "yarn",
}
_NAMES = {"telechat": _TELECHAT_NAMES, "gpt2": _GPT2_NAMES, "llama": _LLAMA_NAMES}

# Fields that rope_parameters and use_mup of a file may stand for.
_OVERRULED = ("rotary_base", "yarn", "input_mult", "output_mult", "mup_scale_factor")

_MODEL_TYPES = ("telechat", "telechat3")  # what the published files call themselves

# Style → switch of the official code → the one value that is computed here, which every published file has.
_FIXED = {
    "telechat": {"apply_residual_connection_post_layernorm": False, "embed_layernorm": False},
    "gpt2": {"activation_function": "silu", "relative_encoding": "rotary", "rotary_use_xpos": False, "scale_attn_weights": True,
             "use_RMSNorm": True},
    "llama": {"hidden_act": "silu"},
}


def _end_ids(name, value):
    """One id, or several as a tuple."""
    ids = fields.token_ids(name, value)
    return ids[0] if len(ids) == 1 else ids


# How each field is read, with its bounds. Sizes and ids are int32 in files and on devices.
_FIELDS = (
    (fields.whole_number, {"least": 1, "most": 2 ** 31 - 1},
     ("vocab_size", "hidden_size", "n_layer", "n_head", "ffn_hidden_size", "num_key_value_heads", "training_seqlen")),
    (fields.whole_number, {"least": 1, "most": 2 ** 31 - 1, "default": None}, ("head_dim", "rotary_ntk_context")),
    (fields.real_number, {"least": 0, "below": 1}, ("hidden_dropout", "attention_dropout", "embedding_dropout")),
    (fields.real_number, {"above": 0}, ("layer_norm_epsilon", "rotary_base", "mup_scale_factor")),
    (fields.real_number, {"least": 0}, ("initializer_range", "input_mult", "output_mult")),
    (fields.flag, {}, ("tie_word_embeddings", "use_bias", "rotary_float16", "rotary_ntk_scales_theta")),
    (fields.token_id, {}, ("bos_token_id", "pad_token_id")),
    (_end_ids, {}, ("eos_token_id",)),
    (fields.one_of, {"choices": ("rotary", "alibi")}, ("position_embedding",)),
    (fields.one_of, {"choices": tuple(_NAMES)}, ("style",)),
)


@dataclasses.dataclass(frozen=True)
class TeleChatConfig:
    """The architecture of one TeleChat model.

    The first group of fields is what the published files give; the second is what the official
    code of each model holds as constants, so that one model file serves all three.

    Raises:
        InputError: a value is out of range, or sizes do not divide.
    """

    vocab_size: int
    hidden_size: int
    n_layer: int
    n_head: int
    ffn_hidden_size: int
    num_key_value_heads: int = None  # None: as many as n_head
    head_dim: int = None  # size of one attention head; None: hidden_size / n_head
    layer_norm_epsilon: float = 1e-5
    initializer_range: float = 0.02
    hidden_dropout: float = 0.0
    attention_dropout: float = 0.0
    training_seqlen: int = 8192  # rotary tables are stretched (NTK) beyond it
    yarn: YarnScaling = None
    tie_word_embeddings: bool = False
    bos_token_id: int = 1
    eos_token_id: int = 2  # or a tuple of several
    pad_token_id: int = 3

    position_embedding: str = "rotary"  # or "alibi"
    rotary_base: float = 10000.0
    rotary_ntk_context: int = 8192  # C of the NTK factor; None: the tables do not depend on the length (TeleChat3)
    rotary_float16: bool = True  # cos and sin are rounded to float16 (TeleChat-1 but 52B, TeleChat2)
    rotary_ntk_scales_theta: bool = False  # 52B: theta·alpha; elsewhere theta·alpha^(D/(D−2)) and mscale
    use_bias: bool = True  # on dense and down_proj
    embedding_dropout: float = 0.0
    input_mult: float = 1.0
    output_mult: float = 1.0
    mup_scale_factor: float = 1.0

    style: str = "telechat"  # of config.json and of the official weights: "telechat", "gpt2" or "llama"
    extra: dict = dataclasses.field(default_factory=dict, compare=False, repr=False)

    def __post_init__(self):
        if self.num_key_value_heads is None:
            object.__setattr__(self, "num_key_value_heads", self.n_head)
        for read, bounds, names in _FIELDS:
            for name in names:
                object.__setattr__(self, name, read(name, getattr(self, name), **bounds))
        if self.head_dim is None:
            if self.hidden_size % self.n_head:
                raise InputError(f"hidden_size {self.hidden_size} must be a multiple of n_head {self.n_head}")
            object.__setattr__(self, "head_dim", self.hidden_size // self.n_head)
        if self.n_head % self.num_key_value_heads:
            raise InputError(f"n_head {self.n_head} must be a multiple of "
                             f"num_key_value_heads {self.num_key_value_heads}")
        if self.position_embedding == "rotary" and self.head_dim % 2:
            raise InputError(f"the size of a head, {self.head_dim}, must be even for rotary positions")
        if self.style == "gpt2" and self.tie_word_embeddings:
            raise InputError("tie_word_embeddings must be false in a config of the 52B style")
        if self.style == "gpt2" and self.head_dim * self.n_head != self.hidden_size:
            raise InputError("head_dim must be hidden_size / n_head in a config of the 52B style")
        if self.style == "llama" and self.use_bias:
            raise InputError("attention_bias and mlp_bias must be false in a config of the TeleChat3 style")

    @property
    def logits_scale(self):
        """What the logits are multiplied by (52B's muP; 1.0 elsewhere)."""
        return self.output_mult / self.mup_scale_factor

    @classmethod
    def from_dict(cls, values):
        """Build from the content of a published ``config.json``, of any of the three styles.

        Keys of the file that the model does not use are kept and written back by `to_dict`.

        Raises:
            InputError: a key that the model needs is missing or has a value that no TeleChat has.
        """
        style = _style(values)
        names = {field.name for field in dataclasses.fields(cls)} - {"style", "extra", "yarn"}
        for key, only in _FIXED[style].items():
            if values.get(key) is not None and values[key] != only:
                raise InputError(f"{key} is {fields.shown(values[key])}, which no published TeleChat has; only "
                                 f"{fields.shown(only)} is supported")
        known = {}
        for key, value in values.items():
            name = _NAMES[style].get(key, key)
            if name in names and value is not None:  # null: as if it were not there
                known[name] = value
        if style == "gpt2":
            known.setdefault("use_bias", False)
            known.setdefault("rotary_float16", False)
            known.setdefault("rotary_ntk_scales_theta", True)
            known.setdefault("rotary_ntk_context", 4096)
            if not fields.flag("use_mup", values.get("use_mup"), True):  # the official code leaves the multipliers out
                known.update(input_mult=1.0, output_mult=1.0, mup_scale_factor=1.0)
            if "ffn_hidden_size" not in known and "hidden_size" in known:
                known["ffn_hidden_size"] = 4 * fields.whole_number("n_embd", known["hidden_size"], 1, 2 ** 29)
        elif style == "llama":
            # transformers 5 writes rope_theta and rope_scaling as one object, rope_parameters.
            rotary = dict(json_object("rope_parameters", values.get("rope_parameters")))
            base = rotary.pop("rope_theta", None)
            known["yarn"] = YarnScaling.from_dict(values.get("rope_scaling") or rotary)
            known.setdefault("rotary_base", 1e6 if base is None else base)
            known.setdefault("training_seqlen", 2048)
            known.setdefault("rotary_ntk_context", None)
            known.setdefault("rotary_float16", False)
            biases = [fields.flag(name, values.get(name), False) for name in ("attention_bias", "mlp_bias")]
            known.setdefault("use_bias", any(biases))
        else:
            # The 7B file says nothing of tying, and transformers ties where a file is silent.
            known.setdefault("tie_word_embeddings", True)
            known.setdefault("rotary_ntk_context", 4096 if known["tie_word_embeddings"] else 8192)
        missing = [name for name in ("vocab_size", "hidden_size", "n_layer", "n_head", "ffn_hidden_size")
                   if name not in known]
        if missing:
            own = {name: key for key, name in _NAMES[style].items()}
            raise InputError(f"the field {own.get(missing[0], missing[0])} is missing")
        return cls(**known, style=style, extra=dict(values))

    @classmethod
    def from_pretrained(cls, directory, quantised=False):
        """Read ``config.json`` of ``directory`` (or that file itself).

        quantised: whether it may be a directory of GPTQ weights, which is refused elsewhere.

        Raises:
            InputError: it is absent, no JSON, or does not describe a TeleChat model.
        """
        path = os.fspath(directory)
        if os.path.isdir(path):
            refuse_foreign_directory(path, quantised)
            path = os.path.join(path, "config.json")
        elif os.path.isfile(path) and not path.endswith(".json"):
            raise InputError(f"{path} is a file; give the checkpoint directory, which holds config.json and the weights")
        values = read_json_object(path, "give a checkpoint directory with a config.json")
        refuse_foreign_config(path, values, quantised)
        try:
            return cls.from_dict(values)
        except InputError as error:
            raise InputError(f"{path}: {error}") from None

    def to_dict(self):
        """The content of ``config.json`` in this config's style; `from_dict` of it equals self."""
        names = {name: key for key, name in _NAMES[self.style].items()}
        values = {"model_type": "telechat3" if self.style == "llama" else "telechat", **self.extra}
        read = type(self).from_dict(values) if self.extra else None
        if read is not None and any(getattr(read, name) != getattr(self, name) for name in _OVERRULED):
            values.pop("rope_parameters", None)
            values.pop("use_mup", None)
            read = type(self).from_dict(values)
        for field in dataclasses.fields(self):
            if field.name in ("style", "extra"):
                continue
            value = getattr(self, field.name)
            # A file that already implies the value stays as it was published.
            if read is None or getattr(read, field.name) != value:
                if field.name == "yarn" and value is not None:
                    value = value.to_dict(self.training_seqlen)
                values[names.get(field.name, field.name)] = value
        return values


def config_keys():
    """The keys of a ``config.json`` that mean something, of every style: set of str."""
    fields = {field.name for field in dataclasses.fields(TeleChatConfig)} - {"style", "extra", "yarn"}
    return fields.union(*_NAMES.values(), *_FIXED.values(),
                        ("model_type", "attention_bias", "mlp_bias", "rope_parameters", "use_mup"))


def _style(values):
    """The style of a file's content: whose names it has.

    Raises:
        InputError: it says that it describes another family of models.
    """
    kind = values.get("model_type")
    llama = "num_hidden_layers" in values and "n_layer" not in values
    if (kind is None and llama) or (kind is not None and kind not in _MODEL_TYPES):
        found = f"model_type is {fields.shown(kind)}" if kind is not None else "model_type is missing from a file of Llama's style"
        raise InputError(f"{found}, which is not supported; TeleChat-1, TeleChat2 (\"telechat\") and TeleChat3 "
                         "(\"telechat3\") are")
    if llama:
        return "llama"
    return "gpt2" if "n_embd" in values else "telechat"
