"""The binding of FlashAttentionScore names a wrong argument; what it is given says what the contract says."""

import mindspore as ms
import numpy as np
import pytest
from mindspore import ops

from telechat import InputError
from telechat.nn import flash_attention as flash
from telechat.nn import flash_tensors as tensors

HALF = ms.float16
MASK = tensors.causal_mask_tensor()


def zeros(*shape, dtype=HALF):
    return ops.zeros(shape, dtype)


def call(layout="BSND", **changes):
    """A right call with some arguments changed."""
    arguments = dict(query=zeros(2, 8, 4, 16), key=zeros(2, 8, 2, 16), value=zeros(2, 8, 2, 16), scale=0.25,
                     layout=layout, mask=MASK, sparse_mode=2)
    return flash.flash_attention(**{**arguments, **changes})


WRONG = {
    "layout": [dict(layout="BSH")],
    "query": [dict(query=zeros(2, 8, 4, 16, dtype=ms.float32)), dict(query=zeros(2, 8, 64)),
              dict(query=zeros(2, 8, 4, 24), key=zeros(2, 8, 2, 24), value=zeros(2, 8, 2, 24)),
              dict(query=zeros(2, 8, 4, 528), key=zeros(2, 8, 2, 528), value=zeros(2, 8, 2, 528))],
    "key": [dict(key=zeros(2, 8, 2, 16, dtype=ms.bfloat16)), dict(key=zeros(2, 8, 3, 16), value=zeros(2, 8, 3, 16)),
            dict(key=zeros(1, 8, 2, 16), value=zeros(1, 8, 2, 16)),
            dict(key=zeros(2, 8, 2, 32), value=zeros(2, 8, 2, 32))],
    "value": [dict(value=zeros(2, 8, 2, 16, dtype=ms.float32)), dict(value=zeros(2, 9, 2, 16))],
    "sparse_mode": [dict(sparse_mode=9), dict(sparse_mode=0, layout="TND", query=zeros(16, 4, 16),
                                              key=zeros(16, 2, 16), value=zeros(16, 2, 16), ends=(16,))],
    "mask": [dict(mask=None), dict(mask=zeros(2048, 2048)), dict(mask=zeros(8, 8, dtype=ms.uint8)),
             dict(mask=zeros(9, 8, dtype=ms.uint8), sparse_mode=0)],
    "keep_prob": [dict(keep_prob=0.0), dict(keep_prob=1.5)],
    "drop_mask": [dict(keep_prob=0.9), dict(drop_mask=zeros(2, 4, 8, 1, dtype=ms.uint8)),
                  dict(keep_prob=0.9, drop_mask=zeros(2, 4, 8, 8, dtype=ms.uint8)),
                  dict(keep_prob=0.9, drop_mask=zeros(2, 4, 8, 1))],
    "real_shift": [dict(real_shift=zeros(1, 4, 8, 8, dtype=ms.float32)), dict(real_shift=zeros(1, 2, 8, 8)),
                   dict(real_shift=zeros(1, 4, 1024, 8)),
                   dict(real_shift=zeros(1, 4, 1024, 16), layout="TND", query=zeros(16, 4, 16), key=zeros(16, 2, 16),
                        value=zeros(16, 2, 16), ends=(16,))],
    "ends": [dict(ends=(8, 16)),
             *(dict(layout="TND", query=zeros(16, 4, 16), key=zeros(16, 2, 16), value=zeros(16, 2, 16), ends=ends)
               for ends in (None, (8, 12), (8, 8, 16), (12, 8, 16), zeros(2, dtype=ms.int32)))],
}


@pytest.mark.parametrize("argument, changes", [(name, changes) for name, cases in WRONG.items() for changes in cases])
def test_a_wrong_argument_is_named(argument, changes):
    with pytest.raises(InputError, match=f"flash attention: {argument} "):
        call(**changes)


def test_the_causal_mask_hides_the_future():
    mask = MASK.asnumpy()
    assert mask.dtype == np.uint8 and mask.shape == (2048, 2048)
    assert mask[3].tolist() == [0] * 4 + [1] * 2044


def test_alibi_bias_rows_hold_the_last_rows():
    slopes = np.array([0.5, 0.25], np.float32)
    whole = tensors.alibi_bias_rows(slopes, 3, 3)
    assert whole[0, 0].tolist() == [[0, 0, 0], [-0.5, 0, 0], [-1, -0.5, 0]]
    assert np.array_equal(whole[0, 1], whole[0, 0] / 2)
    last = tensors.alibi_bias_rows(slopes, 1030, 1024)
    assert last.shape == (1, 2, 1024, 1030)
    assert (last[0, 0, 0, 0], last[0, 0, -1, 0]) == (-3, -514.5)


def test_ends_of_documents():
    """No empty document, always the same number, filler tokens for what is missing."""
    segment_ids = np.array([[0, 0, 0, 0, 0, 0], [7, 7, 1, 1, 1, 2]])
    # Two rows with room for four each, and one: 9 ends, the last of 7 filler tokens.
    assert tensors.document_ends(segment_ids).tolist() == [6, 8, 11, 12, 13, 14, 15, 16, 19]
    assert tensors.document_ends(segment_ids[:1]).tolist() == [6, 7, 8]
    assert tensors.document_ends(segment_ids[1:, :5]).tolist() == [2, 5, 7]
    # One in two parts, and more than the operation takes.
    assert tensors.document_ends(np.array([[0, 1, 0]])) is None
    assert tensors.document_ends(np.arange(2048)[None]) is None


def test_wrong_arguments_are_named_while_a_graph_compiles(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)  # MindSpore writes down what failed

    @ms.jit
    def compiled(query, mask):
        return flash.flash_attention(query, query, query, 0.25, "BSND", mask, 2)

    with pytest.raises(InputError, match="flash attention: query must be float16 or bfloat16"):
        compiled(zeros(1, 8, 4, 16, dtype=ms.float32), MASK)
