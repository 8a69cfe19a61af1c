"""A vocabulary that its ranks do not divide: 5 tokens on 4 ranks, of which the last one holds padding alone."""

import types

import numpy as np
import pytest
from mindspore import Tensor

from telechat.config import TeleChatConfig
from telechat.nn.kernel_choice import choose_kernels
from telechat.model import as_dtype
from telechat.parallel.mesh import Mesh
from telechat.parallel.parallel_config import ParallelConfig
from telechat.parallel.plan import local_slices, vocabulary_rows
from telechat.parallel.vocabulary import VocabularyHeadLoss

CONFIG = TeleChatConfig(vocab_size=5, hidden_size=8, n_layer=1, n_head=2, ffn_hidden_size=8)
RANKS = 4


def test_each_row_is_on_one_rank_and_the_last_holds_none():
    found = [local_slices(name, (5, 8), rank, RANKS) for name in ("transformer.word_embeddings.weight", "lm_head.weight")
             for rank in range(RANKS)]
    assert found == 2 * [(slice(start, stop), slice(0, 8)) for start, stop in ((0, 2), (2, 4), (4, 5), (5, 5))]
    assert vocabulary_rows(CONFIG, RANKS) == 2


@pytest.mark.parametrize("rank", range(RANKS))
def test_the_loss_and_gradient_of_every_rank(rank):
    """Against float64; what the ranks exchange is taken from there. Padding has logits of 0, which must not count."""
    rng = np.random.default_rng(0)
    whole = rng.normal(size=(6, 5)) - 3  # so that a padding's 0 would be the largest
    labels, weights = np.array([0, 1, 2, 3, 4, 4]), np.array([1, 1, 0.5, 1, 1, 0])
    top = whole.max(1, keepdims=True)
    sums = np.exp(whole - top).sum(1, keepdims=True)
    own = np.zeros((6, 2))
    held = whole[:, 2 * rank:2 * rank + 2]
    own[:, :held.shape[1]] = held

    made = VocabularyHeadLoss(CONFIG, 2 * rank, 2, Mesh.create(ParallelConfig()).tensor, choose_kernels(CONFIG, as_dtype("float32")))
    local, exchanged = [], [sums, (whole - top)[np.arange(6), labels]]

    def total(values):
        local.append(values.asnumpy())
        return Tensor(exchanged[len(local) - 1].astype(np.float32))

    def maximum(values):
        local_top.append(values.asnumpy())
        return Tensor(top.astype(np.float32))

    local_top = []
    cell = types.SimpleNamespace(first=2 * rank, padding=made.padding, total=total, maximum=maximum)
    loss, gradient = VocabularyHeadLoss.cross_entropy(cell, Tensor(own.astype(np.float32)), Tensor(labels.astype(np.int32)),
                                                      Tensor(weights.astype(np.float32)))
    probabilities = np.exp(whole - top) / sums
    expected = (probabilities - np.eye(5)[labels]) * weights[:, None]
    here = expected[:, 2 * rank:2 * rank + 2]
    assert np.abs(gradient.asnumpy()[:, :here.shape[1]] - here).max(initial=0) < 1e-6
    assert (gradient.asnumpy()[:, here.shape[1]:] == 0).all()
    assert np.allclose(loss.asnumpy(), -np.log(probabilities[np.arange(6), labels]) * weights, atol=1e-5)
    # What this rank gives to the others: of its own tokens alone.
    assert np.allclose(local[0][:, 0], np.exp(held - top).sum(1), atol=1e-6)
    if held.shape[1]:
        assert np.allclose(local_top[0][:, 0], held.max(1), atol=1e-6)
    else:
        assert local_top[0].max() < -1e8
