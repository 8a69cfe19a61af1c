"""What flash attention is called with says what the portable kernel computes, and both what torch does in float64.

FlashAttentionScore itself runs on a card only; here stands a model of it, in float64, as it is documented.
"""

import mindspore as ms
import numpy as np
import pytest
import torch
from mindspore import Tensor

from telechat.nn import log
from telechat.nn.ascend import AscendKernels
from telechat.nn.kernels import Kernels
from telechat.nn.positions import causal_mask
from tests.test_model import small_config

HEADS, KEY_HEADS, DIM, KEEP = 4, 2, 16, 0.75
SCALE = 0.3


def documented_operation(shift_is_scaled):
    """FlashAttentionScore: its two documentations differ in whether real_shift is multiplied by the scale."""
    def operation(query, key, value, head_num, *, real_shift, drop_mask, attn_mask, actual_seq_qlen, actual_seq_kvlen,
                  keep_prob, scalar_value, input_layout, sparse_mode):
        q, k, v = (part.astype(ms.float32).asnumpy().astype(np.float64) for part in (query, key, value))
        shift = None if real_shift is None else real_shift.astype(ms.float32).asnumpy()
        if input_layout == "TND":
            ends = actual_seq_qlen.tolist()
            places = [(slice(start, end), 0) for start, end in zip([0, *ends], ends)]
        else:
            places = [((row, slice(None)), row) for row in range(len(q))]
        result = np.zeros_like(q)
        for place, row in places:
            keys, values = (np.repeat(part[place], head_num // part.shape[-2], axis=1) for part in (k, v))
            scores = np.einsum("qhd,khd->hqk", q[place], keys)
            length = scores.shape[-1]
            bias = 0 if shift is None else expanded(shift[row % len(shift)], length)
            scores = scalar_value * (scores + bias) if shift_is_scaled else scalar_value * scores + bias
            hides = ~np.tri(length, dtype=bool) if sparse_mode == 2 else attn_mask.asnumpy()[row, 0] == 1
            scores = np.where(hides, -np.inf, scores)
            weights = np.exp(scores - scores.max(-1, keepdims=True))
            weights /= weights.sum(-1, keepdims=True)
            if drop_mask is not None:
                weights = weights * np.unpackbits(drop_mask.asnumpy()[row], axis=-1, bitorder="little") / keep_prob
            result[place] = np.einsum("hqk,khd->qhd", weights, values)
        return Tensor(result.astype(np.float32)).astype(query.dtype)
    return operation


def expanded(shift, length):
    """All rows of a bias of which the last were given, a function of the distance alone."""
    if shift.shape[1] == length:
        return shift
    assert shift.shape[1] == 1024 < length
    last = shift[:, -1]
    return np.stack([np.pad(last[:, length - 1 - row:], ((0, 0), (0, length - 1 - row))) for row in range(length)], 1)


def in_torch(query, key, value, mask, dropout):
    """Attention in float64 of (B, heads, S, D)."""
    query, key, value = (torch.tensor(part, dtype=torch.float64) for part in (query, key, value))
    key, value = (part.repeat_interleave(HEADS // KEY_HEADS, 1) for part in (key, value))
    weights = torch.softmax(query @ key.transpose(2, 3) * SCALE + torch.tensor(mask, dtype=torch.float64), -1)
    return ((weights if dropout is None else weights * torch.tensor(dropout)) @ value).numpy()


def as_dropout(kernels, mask):
    """A mask as `Kernels.attention_dropout` gives one; as bits an eighth of them, the lowest for the first key."""
    if mask is None:
        return None
    bits = kernels.flash and mask.shape[-1] % 8 == 0
    return Tensor(np.packbits(mask != 0, axis=-1, bitorder="little") if bits else mask)


DOCUMENTS = np.repeat([[0, 1, 2], [0, 1, 2]], [5, 3, 16, 9, 14, 1]).reshape(2, 24)
LEFT = np.ones((2, 24), int)
LEFT[1, :7] = 0
MIDDLE = LEFT.copy()
MIDDLE[0, 9:12] = 0
CASES = {
    "dropout": dict(drop=True),
    "ALiBi": dict(alibi=True),
    "long ALiBi": dict(alibi=True, length=1032),
    "ALiBi and dropout": dict(alibi=True, drop=True),
    "documents": dict(segment_ids=DOCUMENTS),
    "documents and ALiBi": dict(segment_ids=DOCUMENTS, alibi=True),
    "documents and dropout": dict(segment_ids=DOCUMENTS, drop=True),
    "documents, ALiBi and dropout": dict(segment_ids=DOCUMENTS, alibi=True, drop=True),
    "left padding": dict(padding=LEFT),
    "left padding, ALiBi and dropout": dict(padding=LEFT, alibi=True, drop=True),
    "padding in the middle": dict(padding=MIDDLE),
    "dropout of 21 tokens": dict(drop=True, length=21),
}


@pytest.mark.parametrize("shift_is_scaled", [True, False], ids=["shift scaled", "shift as it is"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_both_implementations_compute_what_torch_does(monkeypatch, capsys, case, shift_is_scaled):
    from telechat.nn import flash_attention as binding

    monkeypatch.setattr(binding.ops, "flash_attention_score", documented_operation(shift_is_scaled))
    monkeypatch.setattr(log, "_said", set())
    alibi, drop, length = case.get("alibi", False), case.get("drop", False), case.get("length", 24)
    padding, segment_ids = case.get("padding"), case.get("segment_ids")
    config = small_config(position_embedding="alibi" if alibi else "rotary", hidden_size=HEADS * DIM)
    random = np.random.default_rng(0)
    batch = 1 if length > 1024 else 2
    query, key, value = (random.standard_normal((batch, heads, length, DIM)).astype(np.float16)
                         for heads in (HEADS, KEY_HEADS, KEY_HEADS))
    dropout = (random.random((batch, HEADS, length, length)) < KEEP).astype(np.float32) / KEEP if drop else None
    expected = in_torch(query, key, value, causal_mask(config, length, padding, segment_ids), dropout)
    counted = np.ones((batch, length), bool) if padding is None else padding != 0
    keep_prob = KEEP if drop else 1.0
    for kernels, dtype, tolerance in ((Kernels(keep_prob=keep_prob), ms.float32, 5e-6),
                                      (AscendKernels(ms.float16, True, True, keep_prob), ms.float16, 4e-3)):
        heads = [Tensor(part if not kernels.flash else np.ascontiguousarray(part.swapaxes(1, 2))).astype(dtype)
                 for part in (query, key, value)]
        for _ in range(2):
            visible = kernels.attention_tensors(config, length, padding, segment_ids, dropout=drop)
        result = kernels.attention(*heads, *visible, SCALE, as_dropout(kernels, dropout))
        result = result.astype(ms.float32).asnumpy()
        result = result.swapaxes(1, 2) if kernels.flash else result
        for row in range(batch):
            far = np.abs(result[row][:, counted[row]] - expected[row][:, counted[row]]).max()
            assert far <= tolerance * np.abs(expected).max()
    lines = capsys.readouterr().err.splitlines()
    assert lines == (["kernels: attention by portable operations: with dropout flash attention takes lengths of a "
                      "multiple of 8"] if length == 21 else [])
