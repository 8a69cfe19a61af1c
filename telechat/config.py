"""TeleChatConfig: what a model is, read from and written as a published ``config.json``.

The 7B and 12B files share one style, the 52B file has another (GPT-2's names). Both are read
into the same fields, named as in the 12B file, and written back in the style they came in.
"""

import dataclasses
import os

from telechat import fields
from telechat.errors import InputError
from telechat.foreign import refuse_foreign_config, refuse_foreign_directory
from telechat.text_files import read_json_object

# 52B name → field. What has no counterpart there is kept in `extra` and written back untouched.
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


def _end_ids(name, value):
    """One id, or several as a tuple."""
    ids = fields.token_ids(name, value)
    return ids[0] if len(ids) == 1 else ids


# How each field is read, with its bounds. Sizes and ids are int32 in files and on devices.
_FIELDS = (
    (fields.whole_number, {"least": 1, "most": 2 ** 31 - 1},
     ("vocab_size", "hidden_size", "n_layer", "n_head", "ffn_hidden_size", "num_key_value_heads", "training_seqlen",
      "rotary_ntk_context")),
    (fields.real_number, {"least": 0, "below": 1}, ("hidden_dropout", "attention_dropout", "embedding_dropout")),
    (fields.real_number, {"above": 0}, ("layer_norm_epsilon", "rotary_base", "mup_scale_factor")),
    (fields.real_number, {"least": 0}, ("initializer_range", "input_mult", "output_mult")),
    (fields.flag, {}, ("tie_word_embeddings", "use_bias", "rotary_float16", "rotary_ntk_scales_theta")),
    (fields.token_id, {}, ("bos_token_id", "pad_token_id")),
    (_end_ids, {}, ("eos_token_id",)),
    (fields.one_of, {"choices": ("rotary", "alibi")}, ("position_embedding",)),
    (fields.one_of, {"choices": ("telechat", "gpt2")}, ("style",)),
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
    layer_norm_epsilon: float = 1e-5
    initializer_range: float = 0.02
    hidden_dropout: float = 0.0
    attention_dropout: float = 0.0
    training_seqlen: int = 8192  # rotary tables are stretched (NTK) beyond it
    tie_word_embeddings: bool = False
    bos_token_id: int = 1
    eos_token_id: int = 2  # or a tuple of several
    pad_token_id: int = 3

    position_embedding: str = "rotary"  # or "alibi"
    rotary_base: float = 10000.0
    rotary_ntk_context: int = 8192  # C of the NTK factor: 4096 in 7B and 52B, 8192 in 12B
    rotary_float16: bool = True  # 7B and 12B round cos and sin to float16
    rotary_ntk_scales_theta: bool = False  # 52B: theta·alpha; 7B, 12B: theta·alpha^(D/(D−2)) and mscale
    use_bias: bool = True  # on dense and down_proj
    embedding_dropout: float = 0.0
    input_mult: float = 1.0
    output_mult: float = 1.0
    mup_scale_factor: float = 1.0

    style: str = "telechat"  # of config.json and of the official weights: "telechat" or "gpt2"
    extra: dict = dataclasses.field(default_factory=dict, compare=False, repr=False)

    def __post_init__(self):
        if self.num_key_value_heads is None:
            object.__setattr__(self, "num_key_value_heads", self.n_head)
        for read, bounds, names in _FIELDS:
            for name in names:
                object.__setattr__(self, name, read(name, getattr(self, name), **bounds))
        if self.hidden_size % self.n_head:
            raise InputError(f"hidden_size {self.hidden_size} must be a multiple of n_head {self.n_head}")
        if self.n_head % self.num_key_value_heads:
            raise InputError(f"n_head {self.n_head} must be a multiple of "
                             f"num_key_value_heads {self.num_key_value_heads}")
        if self.position_embedding == "rotary" and self.head_dim % 2:
            raise InputError(f"the size of a head, {self.head_dim}, must be even for rotary positions")
        if self.style == "gpt2" and self.tie_word_embeddings:
            raise InputError("tie_word_embeddings must be false in a config of the 52B style")

    @property
    def head_dim(self):
        """Size of one attention head."""
        return self.hidden_size // self.n_head

    @property
    def logits_scale(self):
        """What the logits are multiplied by (52B's muP; 1.0 elsewhere)."""
        return self.output_mult / self.mup_scale_factor

    @classmethod
    def from_dict(cls, values):
        """Build from the content of a published ``config.json``, either style.

        Keys of the file that the model does not use are kept and written back by `to_dict`.
        """
        names = {field.name for field in dataclasses.fields(cls)} - {"style", "extra"}
        gpt2 = "n_embd" in values
        known = {}
        for key, value in values.items():
            name = _GPT2_NAMES.get(key) if gpt2 else key
            name = name or key
            if name in names and value is not None:  # null: as if it were not there
                known[name] = value
        if gpt2:
            known.setdefault("use_bias", False)
            known.setdefault("rotary_float16", False)
            known.setdefault("rotary_ntk_scales_theta", True)
            known.setdefault("rotary_ntk_context", 4096)
            if "ffn_hidden_size" not in known and "hidden_size" in known:
                known["ffn_hidden_size"] = 4 * fields.whole_number("n_embd", known["hidden_size"], 1, 2 ** 29)
        else:
            # The 7B file says nothing of tying, and transformers ties where a file is silent.
            known.setdefault("tie_word_embeddings", True)
            known.setdefault("rotary_ntk_context", 4096 if known["tie_word_embeddings"] else 8192)
        missing = [name for name in ("vocab_size", "hidden_size", "n_layer", "n_head", "ffn_hidden_size")
                   if name not in known]
        if missing:
            own = {name: key for key, name in _GPT2_NAMES.items()} if gpt2 else {}
            raise InputError(f"the field {own.get(missing[0], missing[0])} is missing")
        return cls(**known, style="gpt2" if gpt2 else "telechat", extra=dict(values))

    @classmethod
    def from_pretrained(cls, directory):
        """Read ``config.json`` of ``directory`` (or that file itself).

        Raises:
            InputError: it is absent, no JSON, or does not describe a TeleChat model.
        """
        path = os.fspath(directory)
        if os.path.isdir(path):
            refuse_foreign_directory(path)
            path = os.path.join(path, "config.json")
        elif os.path.isfile(path) and not path.endswith(".json"):
            raise InputError(f"{path} is a file; give the checkpoint directory, which holds config.json and the weights")
        values = read_json_object(path, "give a checkpoint directory with a config.json")
        refuse_foreign_config(path, values)
        try:
            return cls.from_dict(values)
        except InputError as error:
            raise InputError(f"{path}: {error}") from None

    def to_dict(self):
        """The content of ``config.json`` in this config's style; `from_dict` of it equals self."""
        names = {name: key for key, name in _GPT2_NAMES.items()} if self.style == "gpt2" else {}
        values = {"model_type": "telechat", **self.extra}
        read = type(self).from_dict(values) if self.extra else None
        for field in dataclasses.fields(self):
            if field.name in ("style", "extra"):
                continue
            value = getattr(self, field.name)
            # A file that already implies the value stays as it was published.
            if read is None or getattr(read, field.name) != value:
                values[names.get(field.name, field.name)] = value
        return values
