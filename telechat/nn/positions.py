"""What tells attention where tokens are: rotary tables and the additive mask, as numpy arrays."""

import numpy as np

from telechat.nn.alibi import alibi_bias
from telechat.nn.portable_kernels import MASKED
from telechat.nn.rotary import fixed_tables_length, rotary_tables


def sequence_tables(config, length):
    """cos and sin for a whole sequence of ``length`` tokens: float32 (1, 1, length, head_dim) each."""
    cos, sin = rotary_tables(config, np.arange(length), length)
    return cos[None, None], sin[None, None]


def decoding_tables(config, max_length):
    """cos and sin for decoding token by token: float32 (max_length, head_dim) each.

    Row p is what position p gets when it is the newest token, so of a sequence of p + 1. The
    official code caches keys rotated like that: beyond training_seqlen each token keeps the table
    of the length at which it was generated.
    """
    first = min(fixed_tables_length(config), max_length)
    tables = [rotary_tables(config, np.arange(first), first)]
    tables += [rotary_tables(config, [position], position + 1) for position in range(first, max_length)]
    cos, sin = (np.concatenate(parts) for parts in zip(*tables))
    return cos, sin


def causal_mask(config, length, attention_mask=None, documents=None, heads=slice(None)):
    """Additive mask of causal self-attention, with ALiBi's bias where the model has it.

    Args:
        config (TeleChatConfig): ``position_embedding`` and ``n_head`` decide.
        length (int): S.
        attention_mask (array, shape (B, S)): 0 hides a token (padding); None for no padding.
        documents (array of int, shape (B, S)): tokens see those of the same number only; None: all.
        heads (slice): of the n_head heads, those wanted, n.

    Returns:
        float32 array of shape (1 or B, 1 or n, S, S).
    """
    positions = np.arange(length)
    visible = (positions[:, None] >= positions[None, :])[None, None]
    if attention_mask is not None:
        visible = visible & (np.asarray(attention_mask) != 0)[:, None, None, :]
    if documents is not None:
        documents = np.asarray(documents)
        visible = visible & (documents[:, None, :, None] == documents[:, None, None, :])
    bias = alibi_bias(config.n_head, positions, positions)[None, heads] if config.position_embedding == "alibi" else 0
    return np.where(visible, bias, MASKED).astype(np.float32)


def set_apart(padding, documents):
    """Padding (B, S), 0 hides a token, and documents (B, S) as documents alone; each may be None.

    Pads are a document of their own: who sees its own kind only, pads and tokens apart, sees what it should.
    """
    if padding is None:
        return documents
    shown = (np.asarray(padding) != 0).astype(np.int32)
    return shown if documents is None else np.where(shown, documents, -1)
