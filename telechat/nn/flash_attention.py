"""Binding of FlashAttentionScore, the fused attention of Ascend.

MindSpore's front end lets wrong calls pass that end in a wrong result or a fault on the card, so
`flash_attention` checks them while its graph is compiled and names the argument.
"""

import mindspore as ms
from mindspore import ops

from telechat.errors import InputError

LARGEST_HEAD = 512
MASK_SIZE = 2048  # of the causal mask that all lengths share
SHIFT_ROWS = 1024  # of ALiBi's bias that are given for sequences longer than that
MOST_DOCUMENTS = 1024  # in one call
LAYOUTS = {"BNSD": 4, "BSND": 4, "TND": 3}  # and the dimensions of query


def flash_attention(query, key, value, scale, layout, mask=None, sparse_mode=0, real_shift=None, drop_mask=None,
                    keep_prob=1.0, ends=None):
    """softmax(scale·query·keyᵀ + real_shift)·value, by FlashAttentionScore.

    Args:
        query (Tensor): float16 or bfloat16; (B, n, S, D) for layout "BNSD", (B, S, n, D) for "BSND",
            (T, n, D) for "TND", D a multiple of 16 up to 512.
        key, value (Tensor): likewise with m heads; n a multiple of m.
        scale (float): multiplied into the scores.
        layout (str): one of `LAYOUTS`.
        mask (Tensor): uint8 or bool, 1 hides. With sparse_mode 0 (B or 1, 1, S, T), (B, n, S, T) or (S, T);
            with 2 and 3 (causal from the upper left, from the lower right) `causal_mask_tensor`.
        sparse_mode (int): 0, 2 or 3.
        real_shift (Tensor): query's dtype, (B or 1, n, S, T), or its last 1024 rows in a causal
            sequence that is longer. Not in "TND": there its shape would follow the longest document.
        drop_mask (Tensor): uint8, a bit a score, (B, n, S, T / 8), 1 keeps; None with keep_prob 1. Not in
            "TND": there its size would follow the documents' lengths.
        keep_prob (float): in (0, 1].
        ends (Tensor or tuple): int64, only in "TND": where each document ends, rising, the last T.

    Returns:
        Tensor: query's shape and dtype.

    Raises:
        InputError: an argument is wrong; the message names it.
    """
    check_tensors(query.shape, key.shape, value.shape, query.dtype, key.dtype, value.dtype, layout, keep_prob,
                  drop_mask is not None)
    check_mask(None if mask is None else mask.shape, None if mask is None else mask.dtype, sparse_mode, query.shape,
               key.shape, layout)
    if real_shift is not None:
        check_shift(real_shift.shape, real_shift.dtype, query.shape, key.shape, query.dtype, layout, sparse_mode)
    if drop_mask is not None:
        check_drop_mask(drop_mask.shape, drop_mask.dtype, query.shape, key.shape, layout)
    check_ends(ends, query.shape, layout)
    if real_shift is not None:
        # The primitive's documentation and CANN's say scale·(query·keyᵀ + real_shift), the function's
        # scale·query·keyᵀ + real_shift: with the scale in the queries both are the same.
        query, scale = query * scale, 1.0
    return ops.flash_attention_score(query, key, value, heads_of(query.shape, layout), real_shift=real_shift,
                                     drop_mask=drop_mask, attn_mask=mask, actual_seq_qlen=ends, actual_seq_kvlen=ends,
                                     keep_prob=keep_prob, scalar_value=scale, input_layout=layout,
                                     sparse_mode=sparse_mode)


def obstacle(dtype, head_dim):
    """Why FlashAttentionScore cannot serve a model of this dtype and head size, or None."""
    if dtype not in (ms.float16, ms.bfloat16):
        return f"flash attention takes float16 and bfloat16, not {str(dtype).lower()}"
    if head_dim % 16 or head_dim > LARGEST_HEAD:
        return f"flash attention takes heads of a multiple of 16 up to {LARGEST_HEAD}, not {head_dim}"
    return None


def heads_of(shape, layout):
    """The number of heads of a tensor in a layout."""
    return shape[{"BNSD": 1, "BSND": 2, "TND": 1}[layout]]


def _length(shape, layout):
    return shape[{"BNSD": 2, "BSND": 1, "TND": 0}[layout]]


def _refuse(argument, what):
    raise InputError(f"flash attention: {argument} {what}")


@ops.constexpr
def check_tensors(query, key, value, query_dtype, key_dtype, value_dtype, layout, keep_prob, has_drop_mask):
    """Refuse wrong queries, keys, values, layouts and dropout; shapes are tuples."""
    if layout not in LAYOUTS:
        _refuse("layout", f"must be one of {', '.join(LAYOUTS)}, not {layout!r}")
    if query_dtype not in (ms.float16, ms.bfloat16):
        _refuse("query", f"must be float16 or bfloat16, not {query_dtype}")
    for name, dtype in (("key", key_dtype), ("value", value_dtype)):
        if dtype != query_dtype:
            _refuse(name, f"must be {query_dtype} as query is, not {dtype}")
    for name, shape in (("query", query), ("key", key), ("value", value)):
        if len(shape) != LAYOUTS[layout]:
            _refuse(name, f"must have {LAYOUTS[layout]} dimensions in layout {layout}, not {len(shape)}")
    if query[-1] % 16 or not 16 <= query[-1] <= LARGEST_HEAD:
        _refuse("query", f"must have heads of a multiple of 16 up to {LARGEST_HEAD}, not {query[-1]}")
    if key[-1] != query[-1]:
        _refuse("key", f"must have heads of {query[-1]} as query has, not {key[-1]}")
    if value != key:
        _refuse("value", f"must have key's shape {tuple(key)}, not {tuple(value)}")
    if layout != "TND" and key[0] != query[0]:
        _refuse("key", f"must have query's batch of {query[0]}, not {key[0]}")
    if heads_of(query, layout) % heads_of(key, layout):
        _refuse("key", f"has {heads_of(key, layout)} heads, which do not divide query's {heads_of(query, layout)}")
    if not 0 < keep_prob <= 1:
        _refuse("keep_prob", f"must be above 0 and at most 1, not {keep_prob}")
    if keep_prob < 1 and not has_drop_mask:
        _refuse("drop_mask", f"is missing for keep_prob {keep_prob}")
    if keep_prob == 1 and has_drop_mask:
        _refuse("drop_mask", "is given with keep_prob 1")


@ops.constexpr
def check_mask(mask, dtype, sparse_mode, query, key, layout):
    """Refuse a mask that does not fit sparse_mode and the shapes."""
    if sparse_mode not in (0, 2, 3):
        _refuse("sparse_mode", f"must be 0, 2 or 3, not {sparse_mode}")
    if layout == "TND" and sparse_mode == 0:
        _refuse("sparse_mode", "must be 2 or 3 in layout TND, not 0")
    if mask is not None and dtype not in (ms.uint8, ms.bool_):
        _refuse("mask", f"must be uint8 or bool, not {dtype}")
    if sparse_mode != 0:
        if mask is None or tuple(mask) != (MASK_SIZE, MASK_SIZE):
            _refuse("mask", f"must be the causal one of ({MASK_SIZE}, {MASK_SIZE}) with sparse_mode {sparse_mode}, "
                            f"not {None if mask is None else tuple(mask)}")
    elif mask is not None:
        batch, heads, rows, columns = query[0], heads_of(query, layout), _length(query, layout), _length(key, layout)
        fitting = [(rows, columns), *((*axes, rows, columns) for axes in ((1, 1), (batch, 1), (batch, heads)))]
        if tuple(mask) not in fitting:
            _refuse("mask", f"must have shape {(rows, columns)} or {(batch, 1, rows, columns)}, not {tuple(mask)}")


@ops.constexpr
def check_shift(shift, dtype, query, key, query_dtype, layout, sparse_mode):
    """Refuse a position bias of the wrong shape or dtype."""
    if layout == "TND":
        _refuse("real_shift", "cannot be combined with documents (layout TND)")
    if dtype != query_dtype:
        _refuse("real_shift", f"must be {query_dtype} as query is, not {dtype}")
    batch, heads, rows, columns = query[0], heads_of(query, layout), _length(query, layout), _length(key, layout)
    allowed = {rows} if rows <= SHIFT_ROWS or sparse_mode == 0 else {rows, SHIFT_ROWS}
    if len(shift) != 4 or shift[0] not in (1, batch) or shift[1] != heads or shift[2] not in allowed \
            or shift[3] != columns:
        _refuse("real_shift", f"must have shape {(1, heads, min(allowed), columns)}, not {tuple(shift)}")


@ops.constexpr
def check_drop_mask(mask, dtype, query, key, layout):
    """Refuse a dropout mask that is not a bit a score."""
    if layout == "TND":
        _refuse("drop_mask", "cannot be combined with documents (layout TND)")
    if dtype != ms.uint8:
        _refuse("drop_mask", f"must be uint8, not {dtype}")
    columns = _length(key, layout)
    if columns % 8:
        _refuse("drop_mask", f"needs a sequence of a multiple of 8, not {columns}")
    expected = (query[0], heads_of(query, layout), _length(query, layout), columns // 8)
    if tuple(mask) != expected:
        _refuse("drop_mask", f"must have shape {expected}, not {tuple(mask)}")


def check_ends(ends, query, layout):
    """Refuse documents outside layout TND, or none in it, or, as far as they are known, wrong ones."""
    if layout != "TND":
        check_no_ends(ends is None)
    elif isinstance(ends, (tuple, list)):
        check_end_values(ends, query[0])
    elif ends is None:
        check_no_ends(False)
    else:
        check_end_tensor(ends.shape, ends.dtype)


@ops.constexpr
def check_no_ends(are_fine):
    """Refuse ends that are missing, or there without need."""
    if not are_fine:
        _refuse("ends", "must be given in layout TND, and in no other")


@ops.constexpr
def check_end_tensor(shape, dtype):
    """Refuse a tensor of ends of the wrong kind; its values were checked where it was made."""
    if dtype != ms.int64 or len(shape) != 1:
        _refuse("ends", f"must be int64 of one dimension, not {dtype} {tuple(shape)}")


@ops.constexpr
def check_end_values(ends, tokens):
    """Refuse cumulative lengths that do not rise, or do not end at the number of tokens."""
    if len(ends) > MOST_DOCUMENTS:
        _refuse("ends", f"must be at most {MOST_DOCUMENTS} documents, not {len(ends)}")
    if any(later <= earlier for earlier, later in zip((0, *ends), ends)):
        _refuse("ends", f"must rise from document to document: {tuple(ends)}")
    if not ends or ends[-1] != tokens:
        _refuse("ends", f"must end at the {tokens} tokens, not at {ends[-1] if ends else 0}")
