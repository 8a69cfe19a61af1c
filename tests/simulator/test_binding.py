"""What our binding of FlashAttentionScore lets pass, the simulated card takes: both were written from CANN's documents.

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
