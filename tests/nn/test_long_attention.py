"""Attention in pieces: against torch in float64, and against the path that makes all scores."""

import numpy as np
import pytest
import torch
from mindspore import Tensor

from telechat import TeleChat, TrainConfig, Trainer
from telechat.generation.engine import Engine
from telechat.nn import long_attention
from telechat.nn.kernels import Kernels
from telechat.nn.long_attention import Pieces, goes_in_pieces
from telechat.nn.positions import causal_mask
from telechat.parallel.parallel_config import ParallelConfig
from tests.test_model import as_torch, small_config
from tests.torch_reference import TorchTeleChat

HEADS, DIM, SIZE = 4, 8, 8
RANDOM = np.random.default_rng(3)


def draw(*shape):
    return RANDOM.standard_normal(shape).astype(np.float32)


def compare(query, key, value, pieces, mask):
    """Result and gradients against softmax over all scores in float64; all within 2e-5 of the largest."""
    def cut(array):
        return [Tensor(np.ascontiguousarray(array[:, :, start:start + SIZE])) for start in pieces.starts]

    dresult = draw(*query.shape)
    parts = [cut(array) for array in (query, key, value)]
    in_pieces = Kernels().in_pieces
    results, normalisers = in_pieces.attend(*parts, pieces)
    inners = [Tensor(-(one.asnumpy() * other.asnumpy()).sum(-1, keepdims=True))
              for one, other in zip(results, cut(dresult))]
    gradients = in_pieces.attend_backward(*parts, normalisers, cut(dresult), inners, pieces)
    tensors = [torch.tensor(array, dtype=torch.float64, requires_grad=True) for array in (query, key, value)]
    expected = torch.nn.functional.scaled_dot_product_attention(
        *tensors, attn_mask=torch.tensor(mask, dtype=torch.float64), scale=1.0, enable_gqa=True)
    expected.backward(torch.tensor(dresult, dtype=torch.float64))
    for mine, reference in zip((results, *gradients), (expected.detach(), *(tensor.grad for tensor in tensors))):
        mine, reference = np.concatenate([piece.asnumpy() for piece in mine], 2), reference.numpy()
        assert np.abs(mine - reference).max() <= 2e-5 * np.abs(reference).max()


@pytest.mark.parametrize("length, key_heads", [(32, 4), (37, 2), (17, 1), (5, 4)])
def test_causal_attention(length, key_heads):
    """Lengths that are a multiple of a piece's, and that are not; grouped heads."""
    config = small_config()
    compare(draw(2, HEADS, length, DIM), draw(2, key_heads, length, DIM), draw(2, key_heads, length, DIM) + 1,
            Pieces(config, length, size=SIZE), causal_mask(config, length))


def test_position_bias():
    config = small_config(position_embedding="alibi")
    compare(draw(2, HEADS, 29, DIM), draw(2, HEADS, 29, DIM), draw(2, HEADS, 29, DIM),
            Pieces(config, 29, size=SIZE), causal_mask(config, 29))


def test_documents():
    """Some end with a piece, some within; the two rows differ."""
    config = small_config()
    documents = np.repeat([[0, 1, 2, 3], [0, 1, 2, 3]], [8, 11, 3, 15, 20, 4, 5, 8]).reshape(2, 37)
    compare(draw(2, HEADS, 37, DIM), draw(2, HEADS, 37, DIM), draw(2, HEADS, 37, DIM),
            Pieces(config, 37, documents=documents, size=SIZE), causal_mask(config, 37, documents=documents))


def test_pieces_that_see_nothing_of_each_other_are_left_out():
    documents = np.repeat([[0, 1]], 16, axis=1)
    pieces = Pieces(small_config(), 32, documents=documents, size=SIZE)
    assert [[other for other, *_ in pieces.seen_by(number)] for number in range(4)] == [[0], [0, 1], [2], [2, 3]]
    assert all(key_documents is None for number in range(4) for *_, key_documents in pieces.seen_by(number))


def test_a_distant_key_may_outweigh_all_near_ones():
    """Scores of 200 and more apart: what the quick way cannot tell, the exact one does."""
    config = small_config()
    query, key, value = (draw(1, HEADS, 24, DIM) for _ in range(3))
    query[..., 0], key[..., 0] = 10, -10
    key[:, :, 3, 0] = 15
    compare(query, key, value, Pieces(config, 24, size=SIZE), causal_mask(config, 24))


def test_which_way_is_taken():
    assert goes_in_pieces(Kernels(), long_attention.WHOLE + 1)
    assert not goes_in_pieces(Kernels(), long_attention.WHOLE)
    assert not goes_in_pieces(Kernels(), 8192, dropout=True)
    assert not goes_in_pieces(Kernels(flash=True), 8192)


@pytest.fixture
def in_pieces(monkeypatch):
    """in_pieces(True) makes all sequences go in pieces of 8 tokens, in_pieces(False) none."""
    def switch(on):
        monkeypatch.setattr(long_attention, "WHOLE", 0 if on else 10 ** 9)
        monkeypatch.setattr(long_attention, "PIECE", SIZE)
    return switch


def documents_of_two_rows():
    return np.repeat([[0, 1, 2], [0, 1, 2]], [5, 11, 13, 20, 1, 8]).reshape(2, 29)


@pytest.mark.parametrize("fields, recipe, documents, parallel", [
    (dict(num_key_value_heads=2), {}, None, {}),
    (dict(position_embedding="alibi", hidden_dropout=0.2), {}, None, dict(recompute=True)),
    (dict(use_bias=False), dict(mask_padding=True), None, {}),
    ({}, dict(document_mask=True, restart_positions=True), documents_of_two_rows(), {}),
], ids=["grouped heads", "alibi, dropout, recompute", "left padding", "documents"])
def test_training_is_the_same_in_pieces(in_pieces, fields, recipe, documents, parallel):
    """Loss, gradients and evaluation of a model against the path that makes all scores."""
    ids = np.random.default_rng(0).integers(4, 96, (2, 29))
    labels = ids.copy()
    if "mask_padding" in recipe:
        ids[1, :10], labels[1, :11] = 3, -100
    batch = (ids, labels) if documents is None else (ids, labels, documents)
    outcomes = []
    for on in (False, True):
        in_pieces(on)
        model = TeleChat(small_config(initializer_range=0.2, **fields), kernels="portable")
        trainer = Trainer(model, TrainConfig(learning_rate=1e-3, **recipe), ParallelConfig(**parallel))
        evaluation = trainer.evaluate([batch])
        step = trainer.train_step(*batch)
        moments = [moment.asnumpy() for group in trainer.optimizer.first for moment in group]
        outcomes.append((evaluation, step.loss, step.grad_norm, moments))
    (*figures, moments), (*others, other_moments) = outcomes
    assert others == pytest.approx(figures, rel=1e-5)
    for one, other in zip(moments, other_moments, strict=True):
        assert np.abs(one - other).max() <= 1e-4 * np.abs(one).max()


def test_training_in_pieces_equals_torch(in_pieces):
    in_pieces(True)
    model = TeleChat(small_config(initializer_range=0.2), kernels="portable")
    tensors = {name: tensor.clone().requires_grad_(True) for name, tensor in as_torch(model).items()}
    ids = np.random.default_rng(0).integers(4, 96, (2, 29))
    loss = TorchTeleChat(model.config.to_dict(), tensors).loss(torch.tensor(ids), torch.tensor(ids))
    loss.backward()
    result = Trainer(model, TrainConfig(learning_rate=1e-3)).train_step(ids, ids)
    assert result.loss == pytest.approx(loss.item(), rel=1e-5)
    norm = np.sqrt(sum((tensor.grad ** 2).sum().item() for tensor in tensors.values()))
    assert result.grad_norm == pytest.approx(norm, rel=1e-5)


def test_a_prompt_in_pieces_answers_the_same(in_pieces):
    """Logits after the prompt, and after the next token, which reads the cache."""
    model = TeleChat(small_config(initializer_range=0.2, num_key_value_heads=2), kernels="portable")
    prompt = np.random.default_rng(0).integers(4, 96, 43).tolist()
    logits = []
    for on in (False, True):
        in_pieces(on)
        engine = Engine(model, 64)
        engine.reserve(2, 64)
        logits.append(np.stack([engine.prefill([1], [prompt])[0], engine.decode([0, 1], [5, 7], [0, 43])[1]]))
    assert np.abs(logits[0] - logits[1]).max() <= 1e-5 * np.abs(logits[0]).max()


@pytest.mark.parametrize("fields", [dict(num_key_value_heads=2), dict(position_embedding="alibi")],
                         ids=["grouped heads", "alibi"])
def test_a_model_evaluates_the_same_in_pieces(in_pieces, monkeypatch, fields):
    """Logits with left padding, and the losses that evaluation sums; no scores of the whole sequence."""
    from telechat.evaluation.forward import Forward
    from telechat.nn import portable_kernels

    model = TeleChat(small_config(initializer_range=0.2, **fields), kernels="portable")
    ids = np.random.default_rng(0).integers(4, 96, (2, 43))
    shown = np.ones_like(ids)
    shown[1, :11] = 0
    outcomes, whole = [], portable_kernels.attention
    for on in (False, True):
        in_pieces(on)
        if on:
            monkeypatch.setattr(portable_kernels, "attention", None)
        sums, counts = Forward(model).losses(ids.tolist(), ids.tolist())
        outcomes.append((model(ids, shown).asnumpy()[shown == 1], Forward(model).last_logits(ids.tolist()), sums))
    monkeypatch.setattr(portable_kernels, "attention", whole)
    for one, other in zip(*outcomes):
        assert np.abs(one - other).max() <= 1e-5 * np.abs(one).max()


def test_evaluation_in_pieces_equals_torch(in_pieces):
    in_pieces(True)
    model = TeleChat(small_config(initializer_range=0.2), kernels="portable")
    ids = np.random.default_rng(0).integers(4, 96, (2, 43))
    tensors = {name: tensor.double() for name, tensor in as_torch(model).items()}
    reference = TorchTeleChat(model.config.to_dict(), tensors)
    expected = reference(torch.tensor(ids)).numpy()
    assert np.abs(model(ids).asnumpy() - expected).max() <= 2e-5 * np.abs(expected).max()
