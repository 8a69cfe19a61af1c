"""The fused operators take the combinations of dtypes that CANN's own table has, and no others.

The table is that of CANN 8.1.RC1 for the 910B, in ../shared/ascend: of each operator columns of the dtypes of its inputs
and outputs that go together.
"""

import json

import pytest

from simulator.environment import unavailable

if unavailable():
    pytest.skip(unavailable(), allow_module_level=True)

import torch  # noqa: E402

from tests.simulator.aclnn import Float, Out, Refused, call  # noqa: E402

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32, "float": torch.float32,
          "int64": torch.int64, "int32": torch.int32, "uint8": torch.uint8, "bool": torch.bool}
ROWS, WIDTH = 3, 32


def dense(*shape, value=1):
    return lambda dtype: torch.full(shape, value, dtype=dtype)


ROW, X, HALF, TABLE, HEADS = dense(WIDTH), dense(ROWS, WIDTH), dense(ROWS, WIDTH // 2), dense(1, 2, 1, WIDTH), dense(
    1, 2, ROWS, WIDTH)
COLUMN, LABELS, ONE = dense(ROWS, 1), dense(ROWS), dense(1)
# Of attention: what the heads' scores are added to, dropout's bits, a mask that hides nothing, and the softmax's statistics.
SCORES, BITS, MASK, STATISTICS = dense(1, 2, ROWS, ROWS), dense(16, value=255), dense(ROWS, ROWS, value=0), dense(1, 2, ROWS, 8)
ALL = 2147483647  # tokens before and after a query: none is hidden
SETTINGS = (0.25, 0.5, ALL, ALL, 2, "BNSD", 0, 0)  # scale, what dropout keeps, heads, layout, precision, sparse mode
# Of each operator: its tensors in the table's order, inputs and then outputs, and how aclnn's call takes them.
OPERATORS = {
    "RmsNorm": ([X, ROW, X, COLUMN], lambda x, gamma, y, rstd: (x, gamma, 1e-5, Out(y), Out(rstd))),
    "RmsNormGrad": ([X, X, COLUMN, ROW, X, ROW], lambda dy, x, rstd, gamma, dx, dgamma: (
        dy, x, rstd, gamma, Out(dx), Out(dgamma))),
    "AddRmsNorm": ([X, X, ROW, X, COLUMN, X], lambda a, b, gamma, y, rstd, x: (a, b, gamma, 1e-5, Out(y), Out(rstd), Out(x))),
    "SwiGlu": ([X, HALF], lambda x, y: (x, -1, Out(y))),
    "SwiGluGrad": ([HALF, X, X], lambda dy, x, dx: (dy, x, -1, Out(dx))),
    "RotaryPositionEmbedding": ([HEADS, TABLE, TABLE, HEADS], lambda x, cos, sin, y: (x, cos, sin, 0, Out(y))),
    "RotaryPositionEmbeddingGrad": ([HEADS, TABLE, TABLE, HEADS, HEADS, TABLE, TABLE],
                                    lambda dy, cos, sin, x, dx, dcos, dsin: (
                                        dy, cos, sin, x, 0, Out(dx), Out(dcos), Out(dsin))),
    "CrossEntropyLoss": ([X, LABELS, ROW, LABELS, X, LABELS, LABELS], lambda x, labels, weight, loss, p, z, s: (
        x, labels, weight, "none", -100, 0.0, 0.0, False, Out(loss), Out(p), Out(z), Out(s))),
    "CrossEntropyLossGrad": ([LABELS, X, LABELS, ROW, None, None, X], lambda d, p, labels, weight, _, __, dx: (
        d, p, labels, weight, None, None, "none", -100, 0.0, 0.0, Out(dx))),
    "FlashAttentionScore": (
        [HEADS, HEADS, HEADS, SCORES, BITS, None, MASK, *[None] * 5, STATISTICS, STATISTICS, dense(1), HEADS],
        lambda q, k, v, bias, bits, padding, mask, prefix, _, __, ___, ____, largest, total, softmax, y: (
            q, k, v, bias, bits, padding, mask, prefix, *SETTINGS, Out(largest), Out(total), Out(softmax), Out(y))),
    "FlashAttentionScoreGrad": (
        [HEADS, HEADS, HEADS, HEADS, SCORES, BITS, None, MASK, STATISTICS, STATISTICS, None, HEADS, *[None] * 5,
         HEADS, HEADS, HEADS, None],
        lambda q, k, v, dy, bias, bits, padding, mask, largest, total, softmax, y, *others: (
            q, k, v, dy, bias, bits, padding, mask, largest, total, softmax, y, None, *SETTINGS, *map(Out, others[5:8]), None)),
    "ApplyAdamWV2": ([X, X, X, X, ONE, None], lambda w, m, v, gradient, step, _: (
        Out(w), Out(m), Out(v), None, gradient, step, *map(Float, (0.1, 0.9, 0.9, 0.0, 1e-8)), False, False)),
}
# Two tensors of one dtype where the table has also others, which another function of aclnn takes: a bias in float32 is for
# those that make ALiBi's themselves (aclnnFlashAttentionScoreV2).
ALIKE = {"FlashAttentionScore": (0, 3), "FlashAttentionScoreGrad": (0, 4)}
# Outputs that the operator does not touch: the z-loss's, and the softmax's.
NOT_READ = {"CrossEntropyLoss": (5, 6), "FlashAttentionScore": (14,)}


@pytest.fixture(scope="module")
def table(shared):
    return json.loads((shared / "ascend" / "ops_910b_cann81.json").read_text())


def columns_of(entry, tensors):
    """The table's combinations, None where a tensor is not given."""
    names = sorted((key for key in entry if key.startswith("input")), key=lambda key: int(key[5:])) + sorted(
        key for key in entry if key.startswith("output"))
    assert len(names) == len(tensors)
    lists = [entry[name]["dtype"].split(",") for name in names]
    return {tuple(None if tensor is None else DTYPES[dtype] for tensor, dtype in zip(tensors, column, strict=True))
            for column in zip(*lists, strict=True)}


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.ascend) if name == "FlashAttentionScoreGrad" else name
                                  for name in OPERATORS])
def test_dtypes_are_those_of_the_table(table, name):
    tensors, arguments = OPERATORS[name]
    one, other = ALIKE.get(name, (0, 0))
    columns = {column for column in columns_of(table[name], tensors) if column[one] == column[other]}
    assert columns

    def run(dtypes):
        given = [None if dtype is None else make(dtype) for make, dtype in zip(tensors, dtypes, strict=True)]
        return call(f"aclnn{name}", *arguments(*given))

    for column in columns:
        run(column)
    refused = 0
    for column in columns:
        for place, own in enumerate(column):
            for dtype in set(DTYPES.values()) - {own}:
                changed = (*column[:place], dtype, *column[place + 1:])
                if own is None or changed in columns or place in NOT_READ.get(name, ()):
                    continue
                with pytest.raises(Refused):
                    run(changed)
                refused += 1
    assert refused >= 8
