"""Attention piece by piece equals torch's, forward and backward, whatever the pieces are."""

import mindspore as ms
import numpy as np
import pytest
import torch
from mindspore import Tensor, nn, ops

from telechat.nn import portable_attention
from telechat.nn.alibi import alibi_slopes

RANDOM = np.random.default_rng(3)


class Gradient(nn.Cell):
    """Result and gradients of query, key and value, in one graph."""

    def __init__(self, scale):
        super().__init__()
        self.attend = portable_attention.LongAttention(scale)

    @ms.jit
    def construct(self, query, key, value, slopes, documents, weights):
        gradients = ops.GradOperation(get_all=True, sens_param=True)(self.attend)(query, key, value, slopes, documents,
                                                                                 weights)
        return self.attend(query, key, value, slopes, documents), gradients[0], gradients[1], gradients[2]


@pytest.mark.parametrize("heads, alibi, documents", [(4, False, False), (2, True, False), (1, False, True)])
def test_equals_torch(monkeypatch, tmp_path, heads, alibi, documents):
    """150 tokens in pieces of 64, the last one shorter."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(portable_attention, "PIECE", 2 * 4 * 64 * 150)
    assert portable_attention.pieces(2, 4, 150) == ((0, 64), (64, 128), (128, 150))
    shapes = [(2, 4, 150, 8), (2, heads, 150, 8), (2, heads, 150, 8), (2, 4, 150, 8)]
    arrays = [RANDOM.standard_normal(shape).astype(np.float32) for shape in shapes]
    slopes = alibi_slopes(4) if alibi else None
    numbers = np.sort(RANDOM.integers(0, 4, (2, 150)), axis=1).astype(np.int32) if documents else None

    tensors = [torch.tensor(array, requires_grad=True) for array in arrays[:3]]
    mask = torch.zeros(2, 4, 150, 150)
    distance = torch.arange(150)[:, None] - torch.arange(150)[None, :]
    if alibi:
        mask = mask - torch.tensor(slopes)[:, None, None] * distance
    mask = mask.masked_fill(distance < 0, -torch.inf)
    if documents:
        mask = mask.masked_fill((torch.tensor(numbers)[:, None, :, None] != torch.tensor(numbers)[:, None, None, :]),
                                -torch.inf)
    expected = torch.nn.functional.scaled_dot_product_attention(*tensors, attn_mask=mask, scale=0.3, enable_gqa=True)
    expected.backward(torch.tensor(arrays[3]))

    optional = [None if array is None else Tensor(array) for array in (slopes, numbers)]
    results = Gradient(0.3)(*map(Tensor, arrays[:3]), *optional, Tensor(arrays[3]))
    for ours, theirs in zip(results, (expected, *(tensor.grad for tensor in tensors))):
        theirs = theirs.detach().numpy()
        assert np.abs(ours.asnumpy() - theirs).max() < 2e-5 * np.abs(theirs).max()
