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


def token_tables(config, tables, start, count, prompt_length):
    """cos and sin of some tokens of a sequence that is being generated: float32 (count, head_dim) each.

    A prompt's tokens are rotated for the prompt's length, those behind it for their own, as the official code caches
    them: p of them for max(prompt_length, p + 1).

    Args:
        config (TeleChatConfig): of the model.
        tables (tuple): of `decoding_tables`.
        start, count (int): the tokens' positions begin at ``start``.
        prompt_length (int): of the sequence's prompt.
    """
    behind = max(start, 0 if prompt_length <= fixed_tables_length(config) else min(prompt_length, start + count))
    parts = [[table[behind:start + count] for table in tables]]
    if behind > start:
        parts.insert(0, rotary_tables(config, np.arange(start, behind), prompt_length))
    return tuple(np.concatenate(pair) for pair in zip(*parts))


def causal_mask(config, length, attention_mask=None, segment_ids=None, heads=slice(None), queries=slice(None)):
    """Additive mask of causal self-attention, with ALiBi's bias where the model has it.

    Args:
        config (TeleChatConfig): ``position_embedding`` and ``n_head`` decide.
        length (int): S.
        attention_mask (array, shape (B, S)): 0 hides a token (padding) from all but itself; None for no padding.
        segment_ids (array of int, shape (B, S)): tokens see those of the same number only; None: all.
        heads (slice): of the n_head heads, those wanted, n.
        queries (slice): of the S tokens, those whose rows are wanted, Q.

    Returns:
        float32 array of shape (1 or B, 1 or n, Q, S).
    """
    positions = np.arange(length)
    visible = (positions[queries, None] >= positions[None, :])[None, None]
    if attention_mask is not None:
        itself = positions[queries, None] == positions[None, :]
        visible = visible & ((np.asarray(attention_mask) != 0)[:, None, None, :] | itself)
    if segment_ids is not None:
        segment_ids = np.asarray(segment_ids)
        visible = visible & (segment_ids[:, None, queries, None] == segment_ids[:, None, None, :])
    bias = alibi_bias(config.n_head, positions[queries], positions)[None, heads] if config.position_embedding == "alibi" else 0
    return np.where(visible, bias, MASKED).astype(np.float32)


def set_apart(padding, segment_ids):
    """Padding (B, S), 0 hides a token, and segment ids (B, S) as segment ids alone; each may be None.

    Pads are a document of their own: who sees its own kind only, pads and tokens apart, sees what it should.
    """
    if padding is None:
        return segment_ids
    shown = (np.asarray(padding) != 0).astype(np.int32)
    return shown if segment_ids is None else np.where(shown, segment_ids, -1)
