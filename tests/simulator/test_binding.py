"""What our binding of FlashAttentionScore lets pass, the simulated card takes; each limit of the card, the binding knows.

Both were written from CANN's documents.

The binding refuses more (heads that are no multiple of 16, say): that is its own choice.
"""

import itertools

import pytest

from simulator.environment import unavailable

if unavailable():
    pytest.skip(unavailable(), allow_module_level=True)

import mindspore as ms  # noqa: E402
import torch  # noqa: E402

from telechat.errors import InputError  # noqa: E402
from telechat.nn import flash_attention as binding  # noqa: E402
from tests.simulator.aclnn import Refused  # noqa: E402
from tests.simulator.test_flash_attention import ALL, TRIANGLE, score  # noqa: E402

BATCH, ROWS = 2, 8
MASKS = {"none": None, "matrix": (ROWS, ROWS), "each": (BATCH, 1, ROWS, ROWS), "all": (1, 1, ROWS, ROWS),
         "heads": (BATCH, 4, ROWS, ROWS), "heads of all": (1, 4, ROWS, ROWS), "long": (ROWS, ROWS + 1),
         "triangle": (2048, 2048)}
SHIFTS = {"none": None, "all": (1, 4, ROWS, ROWS), "each": (BATCH, 4, ROWS, ROWS), "one head": (1, 1, ROWS, ROWS),
          "one row": (BATCH, 4, 1, ROWS)}
DTYPES = {torch.float32: ms.float32, torch.bfloat16: ms.bfloat16}


def shape_in(layout, heads, dim):
    return {"BNSD": (BATCH, heads, ROWS, dim), "BSND": (BATCH, ROWS, heads, dim), "TND": (ROWS, heads, dim)}[layout]


def accepted(query, key, layout, dtype, mask, mode, shift, drop):
    try:
        binding.check_tensors(query, key, key, *[DTYPES[dtype]] * 3, layout, 0.5 if drop else 1.0, drop)
        binding.check_mask(mask, None if mask is None else ms.uint8, mode, query, key, layout)
        if shift is not None:
            binding.check_shift(shift, DTYPES[dtype], query, key, DTYPES[dtype], layout, mode)
        if drop:
            binding.check_drop_mask((BATCH, 4, ROWS, ROWS // 8), ms.uint8, query, key, layout)
    except InputError:
        return False
    return True


@pytest.mark.parametrize("layout", binding.LAYOUTS)
def test_what_the_binding_lets_pass_the_card_takes(layout):
    refusals, count = [], 0
    for key_heads, dim, dtype, mask, mode, shift, drop in itertools.product(
            (2, 3), (24, 512), (torch.bfloat16, torch.float32), MASKS, (0, 2, 3, 4), SHIFTS, (False, True)):
        query, key = shape_in(layout, 4, dim), shape_in(layout, key_heads, dim)
        if not accepted(query, key, layout, dtype, MASKS[mask], mode, SHIFTS[shift], drop):
            continue
        count += 1
        given = None if MASKS[mask] is None else TRIANGLE if mask == "triangle" else torch.zeros(
            MASKS[mask], dtype=torch.uint8)
        bias = None if SHIFTS[shift] is None else torch.zeros(SHIFTS[shift], dtype=dtype)
        bits = torch.full((BATCH, 4, ROWS, ROWS // 8), 255, dtype=torch.uint8) if drop else None
        ends = ([3, ROWS], [3, ROWS]) if layout == "TND" else ()
        statistics = (ROWS, 4, 8) if layout == "TND" else (BATCH, 4, ROWS, 8)
        keys = torch.zeros(key, dtype=dtype)
        try:
            score(torch.zeros(query, dtype=dtype), keys, keys, bias, bits, given,
                  (0.5 if drop else 1.0, ALL, ALL, 4, layout, mode), statistics, ends)
        except Refused as refusal:
            refusals.append((mask, mode, shift, drop, str(refusal)[:150]))
    assert count >= (2 if layout == "TND" else 30)
    assert not refusals


PLAIN = (2, 4, 16, 16)  # (B, N, S, D)
ROW = (16, 4, 16)  # (T, N, D)
LIMITS = {  # what is wrong in a call, and the argument that the binding names
    "other head sizes": (dict(key=(2, 4, 16, 32)), "key"),
    "heads that do not divide": (dict(key=(2, 3, 16, 16)), "key"),
    "another batch": (dict(key=(1, 4, 16, 16)), "key"),
    "a key of another dtype": (dict(key_dtype=torch.float16), "key"),
    "heads of 784": (dict(query=(2, 4, 16, 784), key=(2, 4, 16, 784)), "query"),
    "an unknown mode": (dict(mode=9), "sparse_mode"),
    "a causal mode without its mask": (dict(mode=2), "mask"),
    "a causal mode with a full mask": (dict(mode=2, mask=torch.zeros(16, 16, dtype=torch.uint8)), "mask"),
    "a mask of another length": (dict(mask=torch.zeros(15, 16, dtype=torch.uint8)), "mask"),
    "a mask of numbers": (dict(mask=torch.zeros(16, 16)), "mask"),
    "dropout without a mask": (dict(keep=0.5), "drop_mask"),
    "a dropout mask that is too short": (dict(keep=0.5, drop=torch.zeros(1, 1, 1, 16, dtype=torch.uint8)), "drop_mask"),
    "a dropout mask of numbers": (dict(keep=0.5, drop=torch.zeros(2, 4, 16, 2)), "drop_mask"),
    "a bias of another length": (dict(bias=torch.zeros(1, 4, 16, 15, dtype=torch.bfloat16)), "real_shift"),
    "a bias of another dtype": (dict(bias=torch.zeros(1, 4, 16, 16)), "real_shift"),
    "documents that end early": (dict(query=ROW, key=ROW, ends=[3, 15], mode=2, mask=TRIANGLE), "ends"),
    "documents that fall": (dict(query=ROW, key=ROW, ends=[9, 3, 16], mode=2, mask=TRIANGLE), "ends"),
    "too many documents": (dict(query=(2100, 4, 16), key=(2100, 4, 16), ends=list(range(1, 2101)), mode=2, mask=TRIANGLE),
                           "ends"),
    "a layout of documents without ends": (dict(query=ROW, key=ROW, layout="TND", mode=2, mask=TRIANGLE), "ends"),
}
IN_MINDSPORE = {**DTYPES, torch.float16: ms.float16, torch.uint8: ms.uint8}


@pytest.mark.parametrize("name", LIMITS)
def test_a_wrong_call_is_refused_by_both(name):
    """The card refuses it, the binding before; the same call without its fault both take."""
    wrong, argument = LIMITS[name]
    with pytest.raises(Refused):
        on_card(**wrong)
    with pytest.raises(InputError, match=f"^flash attention: {argument} "):
        by_binding(**wrong)


def test_a_right_call_is_taken_by_both():
    for right in ({}, dict(query=ROW, key=ROW, ends=[3, 16], mode=2, mask=TRIANGLE)):
        on_card(**right)
        by_binding(**right)


def on_card(query=PLAIN, key=PLAIN, key_dtype=torch.bfloat16, mode=0, mask=None, keep=1.0, drop=None, bias=None, ends=None,
            layout=None):
    layout = layout or ("TND" if ends else "BNSD")
    keys = torch.zeros(key, dtype=key_dtype)
    statistics = (*query[:2], 8) if layout == "TND" else (*query[:3], 8)
    score(torch.zeros(query, dtype=torch.bfloat16), keys, keys, bias, drop, mask, (keep, ALL, ALL, 4, layout, mode),
          statistics, (ends, ends) if ends else ())


def by_binding(query=PLAIN, key=PLAIN, key_dtype=torch.bfloat16, mode=0, mask=None, keep=1.0, drop=None, bias=None,
               ends=None, layout=None):
    layout = layout or ("TND" if ends else "BNSD")
    key_dtype = IN_MINDSPORE[key_dtype]
    binding.check_tensors(query, key, key, ms.bfloat16, key_dtype, key_dtype, layout, keep, drop is not None)
    binding.check_mask(*of_tensor(mask), mode, query, key, layout)
    if bias is not None:
        binding.check_shift(*of_tensor(bias), query, key, ms.bfloat16, layout, mode)
    if drop is not None:
        binding.check_drop_mask(*of_tensor(drop), query, key, layout)
    binding.check_ends(ends, query, layout)


def of_tensor(tensor):
    return (None, None) if tensor is None else (tuple(tensor.shape), IN_MINDSPORE[tensor.dtype])
