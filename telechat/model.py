"""TeleChat: embedding → blocks → norm → head.

Wang et al., "TeleChat Technical Report" (arXiv:2401.03804): a pre-norm decoder with RMSNorm, rotary
positions and a SwiGLU feed-forward layer. What differs between 7B, 12B and 52B are fields of the
config: tied head, biases, rotary tables, and the muP multipliers of embeddings and logits.
"""

import functools
import math
import zlib

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn

from telechat.errors import InputError
from telechat.memory_check import release_freed
from telechat.nn.block import Block
from telechat.nn.kernel_choice import choose_kernels
from telechat.nn.layers import Embedding, Linear, RMSNorm, scope, set_kernels
from telechat.nn.positions import sequence_tables
from telechat.nn.quantised import weight_parameters
from telechat.progress import Progress

LARGE = 1 << 25  # numbers of a tensor, before which what was freed is given back to the system
DTYPES = {"float32": ms.float32, "bfloat16": ms.bfloat16, "float16": ms.float16}


def as_dtype(name):
    """The MindSpore dtype called ``name``; InputError for one that models cannot have."""
    if name not in DTYPES:
        raise InputError(f"dtype must be one of {', '.join(DTYPES)}, not {name!r}")
    return DTYPES[name]


class Transformer(nn.Cell):
    """Everything below the head, under the published names."""

    def __init__(self, make, config, kernels):
        super().__init__()
        self.word_embeddings = Embedding(scope(make, "word_embeddings"), config.vocab_size, config.hidden_size,
                                         kernels)
        self.h = nn.CellList([Block(scope(make, f"h.{layer}"), config, kernels) for layer in range(config.n_layer)])
        self.ln_f = RMSNorm(scope(make, "ln_f"), config.hidden_size, config.layer_norm_epsilon, kernels)


class TeleChat(nn.Cell):
    """A TeleChat model; ``model(input_ids)`` gives the logits.

    Args:
        config (TeleChatConfig): the architecture.
        dtype (str): of the weights: "float32", "bfloat16" or "float16".
        seed (int): of the random weights.
        tensors (callable): ``tensors(name, shape)`` → numpy array, where the weights are not to be
            random: called once for each parameter, by its published name. A Tensor in ``dtype`` is given up to the model.
        kernels (str): "ascend", "cpu" or "portable" operations; None: what the device has.
        use_flash_attention, use_paged_attention (bool): False turns it off, True refuses a model that cannot have it;
            None: where it is.

    Raises:
        InputError: the device cannot do what was asked for.
    """

    own_heads = slice(None)  # which heads are computed here: all
    shared = None  # what is shared with processes that hold the rest: there are none

    def __init__(self, config, dtype="float32", seed=0, tensors=None, kernels=None, use_flash_attention=None,
                 use_paged_attention=None):
        super().__init__()
        self.config = config
        self.dtype = as_dtype(dtype)
        self.kernels = choose_kernels(config, self.dtype, kernels, use_flash_attention, use_paged_attention)
        tensors = tensors or functools.partial(initial_tensor, config, seed)

        def make(name, shape):
            return weight_parameters(tensors(name, shape), self.dtype, self.kernels)  # it takes its name from the cells it sits in

        self.transformer = Transformer(scope(make, "transformer"), config, self.kernels)
        self.lm_head = None
        if not config.tie_word_embeddings:
            self.lm_head = Linear(scope(make, "lm_head"), config.hidden_size, config.vocab_size)
        self.set_train(False)

    @property
    def compute_dtype(self):
        """Dtype of the activations."""
        return self.kernels.dtype

    @property
    def embeds_in_graphs(self):
        """Whether `embed` may be part of a compiled graph."""
        return self.kernels.embeds_in_graphs(self.dtype)

    def set_kernels(self, kernels):
        """Let other `Kernels` compute."""
        set_kernels(self, kernels)

    @property
    def head_weight(self):
        """(vocabulary, hidden): the head's own weight, or the embedding where they are tied."""
        return self.transformer.word_embeddings.weight if self.lm_head is None else self.lm_head.weight

    def embed(self, input_ids):
        """int32 (B, S) → (B·S, H), muP's multiplier included."""
        x = self.transformer.word_embeddings(input_ids.reshape(-1), self.compute_dtype)
        return x if self.config.input_mult == 1 else x * self.config.input_mult

    def head(self, x):
        """(N, H) after the last block → float32 logits (N, V)."""
        logits = self.kernels.linear(self.transformer.ln_f(x), self.head_weight).astype(ms.float32)
        return logits if self.config.logits_scale == 1 else logits * self.config.logits_scale

    def __call__(self, input_ids, attention_mask=None):
        """Logits of whole sequences.

        Args:
            input_ids (Tensor or array): int32 (B, S).
            attention_mask (Tensor or array): (B, S), 0 where padding; positions count padding too,
                as in the official code.

        Returns:
            Tensor: float32 (B, S, V).

        Raises:
            InputError: the shape is wrong or an id is outside the vocabulary.
        """
        ids = check_ids(input_ids, self.config.vocab_size)
        padding = None if attention_mask is None else _array(attention_mask)
        if padding is not None and padding.shape != ids.shape:
            raise InputError(f"attention_mask has shape {padding.shape}, input_ids {ids.shape}: they must agree")
        batch, length = ids.shape
        self.kernels.require_device()
        return super().__call__(Tensor(ids), *self.tables(length, padding)).reshape(batch, length, -1)

    def tables(self, length, padding=None):
        """The arguments of `construct` after the tokens; padding as `__call__`'s attention_mask."""
        cos, sin = map(self.kernels.rotary_tensor, sequence_tables(self.config, length))
        return cos, sin, *self.kernels.attention_tensors(self.config, length, padding)

    def construct(self, input_ids, cos, sin, mask, position_bias, segment_ids):
        """The computation on tensors alone: logits (B·S, V).

        cos, sin (1, 1, S, D); mask, position_bias, segment_ids: of `Kernels.attention_tensors`.
        """
        x = self.embed(input_ids)
        for block in self.transformer.h:
            x = block(x, cos, sin, (mask, position_bias, segment_ids))
        return self.head(x)

    @classmethod
    def from_pretrained(cls, directory, dtype="float32", kernels=None, use_flash_attention=None,
                        use_paged_attention=None, lora=None):
        """Load a checkpoint directory (``config.json`` and ``model*.safetensors``).

        Weights are converted to ``dtype`` a few rows at a time; ``lora``: the directory of a LoRA adapter, as the peft
        package saves it, that is added to them, and to quantised ones put beside. The other arguments are the class's.

        Raises:
            InputError: files are missing or broken, or tensors do not fit the config.
        """
        from telechat.adapters.attached import Attachment
        from telechat.adapters.peft import open_checkpoint
        from telechat.checkpoint.layout import parameter_shapes
        from telechat.checkpoint.reader import read_as

        as_dtype(dtype)
        reader, beside = open_checkpoint(directory, lora)
        config = reader.config
        reader.check(parameter_shapes(config))
        with Progress("loading weights", len(reader.names), "tensors") as progress:
            def read(name, shape):
                progress.advance()
                if math.prod(shape) > LARGE:
                    release_freed()
                value = read_as(reader, name, dtype)
                return Tensor.from_numpy(value) if isinstance(value, np.ndarray) else value

            model = cls(config, dtype, tensors=read, kernels=kernels, use_flash_attention=use_flash_attention,
                        use_paged_attention=use_paged_attention)
        release_freed()
        if beside is not None:
            Attachment(model).put(beside)
        return model

    def save_pretrained(self, directory):
        """Write ``config.json`` and safetensors under the published 12B's names, atomically.

        Raises:
            InputError: the directory cannot be written, or products are quantised.
        """
        from telechat.checkpoint.writer import write_checkpoint

        if any(getattr(cell, "is_quantised", False) for _, cell in self.cells_and_names()):
            raise InputError("the model's products are quantised, and it is not written again; copy the directory it was read "
                             "from")

        tensors = ((parameter.name, parameter.asnumpy()) for parameter in self.get_parameters())
        write_checkpoint(directory, self.config, tensors)


def initial_tensor(config, seed, name, shape):
    """A new weight: ones for norms, zeros for biases, else normal with ``initializer_range``; float32.

    A function of seed and name, so that any process can make any parameter.
    """
    if name.endswith("bias"):
        return np.zeros(shape, np.float32)
    if len(shape) == 1:
        return np.ones(shape, np.float32)
    random = np.random.default_rng([seed, zlib.crc32(name.encode())])
    return random.standard_normal(shape, np.float32) * np.float32(config.initializer_range)


def check_ids(input_ids, vocab_size):
    """``input_ids`` as an int32 array (B, S); InputError unless it is one, within the vocabulary."""
    ids = _array(input_ids)
    if ids.ndim != 2 or ids.size == 0 or not np.issubdtype(ids.dtype, np.integer):
        raise InputError(f"input_ids must be whole numbers of shape (batch, sequence), not {ids.dtype} {ids.shape}")
    if ids.min() < 0 or ids.max() >= vocab_size:
        wrong = ids[(ids < 0) | (ids >= vocab_size)][0]
        raise InputError(f"token id {wrong} is outside the model's vocabulary of {vocab_size}; "
                         "check that the tokenizer belongs to the model")
    return ids.astype(np.int32)


def _array(values):
    return values.asnumpy() if isinstance(values, ms.Tensor) else np.asarray(values)
