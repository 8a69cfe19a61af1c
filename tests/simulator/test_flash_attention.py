"""FlashAttentionScore of the simulated card and its gradient against torch in float64, in every layout it takes.

What they compute: CANN's documentation of aclnnFlashAttentionScore, …VarLenScore, …ScoreGrad and …UnpaddingScoreGrad,
and its page on sparse_mode.
"""

import pytest

from simulator.environment import unavailable

if unavailable():
    pytest.skip(unavailable(), allow_module_level=True)

import torch  # noqa: E402

from tests.simulator.aclnn import Out, Refused, call, empty  # noqa: E402

TRIANGLE = torch.triu(torch.ones(2048, 2048, dtype=torch.uint8), 1)
ALL = 2147483647  # preTokens and nextTokens that hide nothing
SCALE = 0.3


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape))).to(dtype)


def chance(*shape, seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def attention(query, key, value, hidden=None, bias=None, kept=None):
    """The formula, in (B, N, S, D); kept holds 0 or 1 / keep_prob."""
    group = query.shape[1] // key.shape[1]
    scores = query @ key.repeat_interleave(group, 1).transpose(-1, -2)
    scores = SCALE * (scores if bias is None else scores + bias)
    if hidden is not None:
        scores = scores.masked_fill(hidden, -torch.inf)
    probabilities = scores.softmax(-1)
    if kept is not None:
        probabilities = probabilities * kept
    return probabilities @ value.repeat_interleave(group, 1), scores


def laid_out(tensor, layout):
    """(B, N, S, D) in another layout; BSND as a view with strides."""
    batch, heads, length, dim = tensor.shape
    if layout == "BNSD":
        return tensor
    if layout == "BSND":
        return tensor.transpose(1, 2)
    if layout == "BSH":
        return tensor.transpose(1, 2).reshape(batch, length, heads * dim)
    return tensor.permute(2, 0, 1, 3).reshape(length, batch, heads * dim)


def packed_bits(kept):
    """A bit an element, lowest first, in bytes up to a multiple of 128 bits."""
    bits = torch.zeros((kept.numel() + 127) // 128 * 128, dtype=torch.int64)
    bits[:kept.numel()] = kept.flatten()
    return (bits.view(-1, 8) << torch.arange(8)).sum(1).to(torch.uint8)


def distance(queries, keys, from_lower_right):
    """How far each key is behind its query."""
    shift = keys - queries if from_lower_right else 0
    return torch.arange(queries)[:, None] + shift - torch.arange(keys)[None]


def score(query, key, value, bias, drop, mask, settings, statistics, ends=()):
    """settings: keep, before, after, heads, layout, sparse mode."""
    keep, before, after, heads, layout, mode = settings
    result = Out(torch.zeros_like(query))
    name = "aclnnFlashAttentionVarLenScore" if ends else "aclnnFlashAttentionScore"
    largest, total, attended = call(name, query, key, value, bias, drop, None, mask, None, *ends, SCALE, keep, before,
                                    after, heads, layout, 0, mode, empty(*statistics), empty(*statistics), None, result)
    return attended, largest, total


def gradients(query, key, value, incoming, bias, drop, mask, settings, forward, ends=()):
    attended, largest, total = forward
    keep, before, after, heads, layout, mode = settings
    name = "aclnnFlashAttentionUnpaddingScoreGrad" if ends else "aclnnFlashAttentionScoreGrad"
    if mask is not None and query.dtype == torch.float32:
        mask = mask.bool()  # another it does not take there
    return call(name, query, key, value, incoming, bias, drop, None, mask, largest, total, None, attended, None, *ends,
                SCALE, keep, before, after, heads, layout, 0, mode, *(Out(torch.zeros_like(t)) for t in (query, key, value)),
                None)


def assert_close(result, expected, tolerance):
    assert result.shape == expected.shape
    assert (result.double() - expected).abs().max() <= tolerance * max(1.0, expected.abs().max())


@pytest.mark.parametrize("layout, dtype", [("BNSD", torch.float32), ("BSND", torch.bfloat16), ("BSND", torch.float16),
                                           ("BSH", torch.float32), ("SBH", torch.float32)])
@pytest.mark.parametrize("mode, kind, bias_batch, keep", [
    (0, None, None, 1.0), (0, "each", 1, 0.7), (0, "shared", 2, 1.0), (1, "heads", None, 0.7), (2, "triangle", 1, 0.7),
    (3, "triangle", None, 1.0), (4, "triangle", 2, 1.0)])
def test_attention_and_its_gradient(layout, dtype, mode, kind, bias_batch, keep):
    """Grouped heads, masks of every mode, a position bias, dropout by bits."""
    heads, queries, keys = 4, 9, 11 if mode == 3 else 9
    tensors = [normal(2, n, s, 16, seed=i, dtype=dtype) for i, (n, s) in
               enumerate(((heads, queries), (2, keys), (2, keys)))]
    before, after = (3, 1) if mode == 4 else (ALL, ALL)
    behind = distance(queries, keys, mode in (3, 4))
    hidden = {None: None, "each": chance(2, 1, queries, keys) > 0.5, "shared": chance(queries, keys) > 0.5,
              "heads": chance(2, heads, queries, keys) > 0.5, "triangle": behind < (-1 if mode == 4 else 0)}[kind]
    if mode == 4:
        hidden = hidden | (behind > 3)
    if kind in ("each", "shared", "heads"):
        hidden[..., 0] = False  # no row without a key
    mask = TRIANGLE if kind == "triangle" else hidden
    bias = None if bias_batch is None else normal(bias_batch, heads, queries, keys, dtype=dtype)
    kept = None if keep == 1 else chance(2, heads, queries, keys, seed=5) < keep
    drop = None if kept is None else packed_bits(kept)

    wide = [tensor.double().requires_grad_() for tensor in tensors]
    expected, scores = attention(*wide, hidden, None if bias is None else bias.double(),
                                 None if kept is None else kept / keep)
    incoming = normal(*expected.shape, seed=7, dtype=dtype)
    expected.backward(incoming.double())

    settings = keep, before, after, heads, layout, mode
    given = [laid_out(tensor, layout) for tensor in tensors]
    forward = score(*given, bias, drop, mask, settings, (2, heads, queries, 8))
    tolerance = {torch.float32: 2e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}[dtype]
    assert_close(forward[0], laid_out(expected.detach(), layout), tolerance)
    assert_close(forward[1], scores.max(-1, keepdim=True).values.detach().expand(-1, -1, -1, 8), 2e-6)
    assert_close(forward[2].log() + forward[1], scores.logsumexp(-1, True).detach().expand(-1, -1, -1, 8), 2e-6)
    results = gradients(*given, laid_out(incoming, layout), bias, drop, mask, settings, forward)
    for result, tensor in zip(results, wide, strict=True):
        assert_close(result, laid_out(tensor.grad, layout), 2 * tolerance)


@pytest.mark.parametrize("mode", [0, 2, 3])
@pytest.mark.parametrize("keep", [1.0, 0.6])
def test_sequences_in_a_row(mode, keep):
    lengths, key_lengths = [3, 5, 1], [3, 7, 1] if mode == 3 else [3, 5, 1]
    query, key, value = (normal(sum(s), n, 16, seed=i).double().requires_grad_() for i, (s, n) in
                         enumerate(((lengths, 4), (key_lengths, 2), (key_lengths, 2))))
    results, bits = [], []
    for parts in zip(query.split(lengths), key.split(key_lengths), value.split(key_lengths), strict=True):
        queries, keys = len(parts[0]), len(parts[1])
        kept = chance(1, 4, queries, keys, seed=queries) < keep
        bits.append(kept.flatten())
        hidden = distance(queries, keys, mode == 3) < 0 if mode else None
        results.append(attention(*(part.transpose(0, 1)[None] for part in parts), hidden, None, kept / keep)[0])
    expected = torch.cat([result[0].transpose(0, 1) for result in results])
    incoming = normal(9, 4, 16, seed=7)
    expected.backward(incoming.double())

    ends = ([3, 8, 9], [3, 10, 11] if mode == 3 else [3, 8, 9])
    given = [tensor.detach().float() for tensor in (query, key, value)]
    drop = None if keep == 1 else packed_bits(torch.cat(bits))
    mask, settings = TRIANGLE if mode else None, (keep, ALL, ALL, 4, "TND", mode)
    forward = score(*given, None, drop, mask, settings, (9, 4, 8), ends)
    assert_close(forward[0], expected.detach(), 2e-6)
    for result, tensor in zip(gradients(*given, incoming, None, drop, mask, settings, forward, ends),
                              (query, key, value), strict=True):
        assert_close(result, tensor.grad, 4e-6)


def test_last_rows_of_alibi_stand_for_all():
    """Of a causal sequence longer than 1024 the bias's last 1024 rows are given."""
    length = 1100
    query, key, value = (normal(1, 2, length, 16, seed=i) for i in range(3))
    behind = distance(length, length, False)
    bias = -behind.abs() * torch.tensor([0.5, 0.1])[:, None, None]
    expected, _ = attention(query.double(), key.double(), value.double(), behind < 0, bias[None].double())
    attended, _, _ = score(query, key, value, bias[None, :, -1024:], None, TRIANGLE, (1.0, ALL, ALL, 2, "BNSD", 2),
                           (1, 2, length, 8))
    assert_close(attended, expected, 1e-5)


def test_a_row_that_sees_nothing_is_the_mean_of_all_values():
    query, key, value = (normal(1, 1, 4, 16, seed=i) for i in range(3))
    attended, _, _ = score(query, key, value, None, None, torch.ones(4, 4, dtype=torch.bool),
                           (1.0, ALL, ALL, 1, "BNSD", 0), (1, 1, 4, 8))
    assert_close(attended, value.double().mean(2, keepdim=True).expand(1, 1, 4, 16), 1e-6)


Q = (1, 4, 8, 16)  # (B, N, S, D)


@pytest.mark.parametrize("change, words", [
    ({"key": (1, 3, 8, 16)}, "query's 4 heads are no multiple of key's 3"),
    ({"key": (1, 4, 8, 24)}, "query's heads have 16 columns, key's 24"),
    ({"key": (2, 4, 8, 16)}, "batch"),
    ({"query": (1, 4, 8, 784), "key": (1, 4, 8, 784)}, "heads must have 1 to 768 columns"),
    ({"query": (1, 257, 8, 16), "key": (1, 257, 8, 16), "heads": 257}, "headNum must be 1 to 256"),
    ({"heads": 2}, "headNum is 2, but query has 4 heads"),
    ({"key_dtype": torch.float16}, "key is float16"),
    ({"layout": "TND"}, "inputLayout must be one of BSH SBH BSND BNSD not TND"),
    ({"mode": 2}, "sparse mode 2 needs attenMask"),
    ({"mode": 2, "mask": torch.ones(8, 8, dtype=torch.uint8)}, "attenMask has shape .*must have .2048,2048."),
    ({"mode": 2, "mask": 1 - TRIANGLE}, "must hide what is above its diagonal"),
    ({"mask": torch.zeros(7, 8, dtype=torch.uint8)}, "attenMask must be"),
    ({"mask": torch.zeros(8, 8)}, "attenMask is float32"),
    ({"mode": 9}, "sparse"),
    ({"keep": 0.5}, "keepProb 0.5 needs dropMask"),
    ({"keep": 0.5, "drop": torch.zeros(16, dtype=torch.uint8)}, "dropMask has 16 bytes"),
    ({"bias": torch.zeros(1, 4, 8, 7)}, "realShift must be"),
    ({"bias": torch.zeros(1, 4, 8, 8, dtype=torch.bfloat16)}, "realShift is bfloat16"),
])
def test_calls_that_cann_refuses(change, words):
    key = normal(*change.get("key", Q), dtype=change.get("key_dtype", torch.float32))
    settings = change.get("keep", 1.0), ALL, ALL, change.get("heads", 4), change.get("layout", "BNSD"), change.get("mode", 0)
    with pytest.raises(Refused, match=words):
        score(normal(*change.get("query", Q)), key, key, change.get("bias"), change.get("drop"), change.get("mask"),
              settings, (1, 4, 8, 8))


@pytest.mark.parametrize("ends, mode, words", [
    (([3, 8], [3, 8]), 2, "end at 8 and 8, but query has 9 rows"),
    (([3, 2, 9], [3, 2, 9]), 2, "must not fall"),
    (([3, 9], [9]), 2, "same length"),
    (([4, 9], [3, 9]), 3, "sequence 0 has 4 queries for 3 keys"),
    ((list(range(1, 10)) + [9] * 2040, list(range(1, 10)) + [9] * 2040), 2, "at most 2048 sequences"),
])
def test_sequences_that_cann_refuses(ends, mode, words):
    tensor = normal(9, 2, 16)
    with pytest.raises(Refused, match=words):
        score(tensor, tensor, tensor, None, None, TRIANGLE, (1.0, ALL, ALL, 2, "TND", mode), (9, 2, 8), ends)
