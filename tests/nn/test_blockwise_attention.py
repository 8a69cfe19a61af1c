"""Attention by blocks of queries: against torch in float64, and against the path that makes all scores."""

import mindspore as ms
import numpy as np
import pytest
import torch
from mindspore import Tensor

from telechat import TeleChat, TrainConfig, Trainer
from telechat.generation.engine import Engine
from telechat.nn import blockwise_attention
from telechat.nn.ascend import AscendKernels
from telechat.nn.blockwise_attention import BlockwiseAttention, causal_blocks, dropout_blocks
from telechat.nn.dropout import Place, dropout_mask
from telechat.nn.kernels import Kernels
from telechat.nn.positions import causal_mask
from telechat.parallel.parallel_config import ParallelConfig
from tests.test_model import as_torch, small_config
from tests.torch_reference import TorchTeleChat

HEADS, DIM, SIZE = 4, 8, 8
RANDOM = np.random.default_rng(3)


def draw(*shape):
    return RANDOM.standard_normal(shape).astype(np.float32)


@pytest.fixture
def by_blocks(monkeypatch):
    """by_blocks(True) makes all sequences go by blocks of 8 queries, by_blocks(False) none."""
    def switch(on):
        monkeypatch.setattr(blockwise_attention, "LONGEST_WHOLE", 0 if on else 10 ** 9)
        monkeypatch.setattr(blockwise_attention, "block_size", lambda length: SIZE)
    return switch


@pytest.mark.parametrize("fields, length, padding, segment_ids, dropout", [
    ({}, 32, None, None, 0.0),
    (dict(num_key_value_heads=2), 37, None, None, 0.2),
    (dict(num_key_value_heads=1), 17, None, None, 0.0),
    ({}, 5, None, None, 0.0),
    (dict(position_embedding="alibi"), 29, None, None, 0.0),
    ({}, 37, None, np.repeat([[0, 1, 2, 3]] * 2, [8, 11, 3, 15, 20, 4, 5, 8]).reshape(2, 37), 0.0),
    ({}, 29, np.arange(58).reshape(2, 29) % 29 >= [[0], [10]], None, 0.3),
], ids=["whole blocks", "grouped heads, dropout", "one head of keys", "less than a block", "alibi", "documents",
        "left padding, dropout"])
def test_result_and_gradients(by_blocks, fields, length, padding, segment_ids, dropout):
    """Against softmax over all scores in float64; all within 2e-5 of the largest."""
    by_blocks(True)
    config, scale, place = small_config(**fields), 0.4, Place(1, 2, [5, 9], 3)
    shown = np.ones((2, length), bool) if padding is None else padding
    keys = config.num_key_value_heads
    arrays = [draw(2, HEADS, length, DIM), draw(2, keys, length, DIM), draw(2, keys, length, DIM) + 1]
    dresult = draw(2, HEADS, length, DIM) * shown[:, None, :, None]  # what pads see does not matter
    masks = causal_blocks(config, length, padding, segment_ids)
    drops = dropout_blocks(length, dropout, place, range(HEADS)) if dropout else None
    attention, tensors = BlockwiseAttention(), [Tensor(array) for array in arrays]
    mine = [attention(*tensors, masks, scale, drops),
            *attention.backward(Tensor(dresult), *tensors, masks, scale, drops)]

    query, key, value = leaves = [torch.tensor(array, dtype=torch.float64, requires_grad=True) for array in arrays]
    key, value = (heads.repeat_interleave(HEADS // keys, 1) for heads in (key, value))
    scores = query @ key.transpose(2, 3) * scale + torch.tensor(causal_mask(config, length, padding, segment_ids))
    weights = torch.softmax(scores, -1)
    if dropout:
        weights = weights * torch.tensor(dropout_mask(length, length, dropout, place, range(HEADS)))
    expected = weights @ value
    expected.backward(torch.tensor(dresult, dtype=torch.float64))
    expected = expected.detach() * torch.tensor(shown)[:, None, :, None]
    mine[0] = Tensor(mine[0].asnumpy() * shown[:, None, :, None])
    for result, reference in zip(mine, (expected, *(leaf.grad for leaf in leaves)), strict=True):
        assert np.abs(result.asnumpy() - reference.numpy()).max() <= 2e-5 * reference.abs().max()


@pytest.mark.parametrize("length", [1025, 8192, 100_000])
def test_blocks_have_a_bounded_number_of_scores(length):
    blocks = causal_blocks(small_config(), length).blocks()
    assert [query for first, last in blocks for query in range(first, last)] == list(range(length))
    assert all((last - first) * length <= blockwise_attention.SCORES for first, last in blocks)


def test_which_way_is_taken():
    assert Kernels().goes_by_blocks(blockwise_attention.LONGEST_WHOLE + 1)
    assert Kernels().goes_by_blocks(8192, dropout=True)
    assert not Kernels().goes_by_blocks(blockwise_attention.LONGEST_WHOLE)
    assert not AscendKernels(ms.float32, flash=False).goes_by_blocks(8192, dropout=True)
    assert not AscendKernels(ms.float32).goes_by_blocks(8192)


def documents_of_two_rows():
    return np.repeat([[0, 1, 2], [0, 1, 2]], [5, 11, 13, 20, 1, 8]).reshape(2, 29)


@pytest.mark.parametrize("fields, recipe, segment_ids, parallel", [
    (dict(num_key_value_heads=2), {}, None, {}),
    (dict(position_embedding="alibi", hidden_dropout=0.2, attention_dropout=0.3), {}, None, dict(recompute=True)),
    (dict(use_bias=False), dict(mask_padding=True), None, {}),
    ({}, dict(document_mask=True, restart_positions=True), documents_of_two_rows(), {}),
], ids=["grouped heads", "alibi, dropout, recompute", "left padding", "documents"])
def test_training_is_the_same_by_blocks(by_blocks, fields, recipe, segment_ids, parallel):
    """Loss, gradients and evaluation of a model against the path that makes all scores."""
    ids = np.random.default_rng(0).integers(4, 96, (2, 29))
    labels = ids.copy()
    if "mask_padding" in recipe:
        ids[1, :10], labels[1, :11] = 3, -100
    batch = (ids, labels) if segment_ids is None else (ids, labels, segment_ids)
    outcomes = []
    for on in (False, True):
        by_blocks(on)
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


def test_training_by_blocks_equals_torch(by_blocks):
    by_blocks(True)
    model = TeleChat(small_config(initializer_range=0.2), kernels="portable")
    tensors = {name: tensor.clone().requires_grad_(True) for name, tensor in as_torch(model).items()}
    ids = np.random.default_rng(0).integers(4, 96, (2, 29))
    loss = TorchTeleChat(model.config.to_dict(), tensors).loss(torch.tensor(ids), torch.tensor(ids))
    loss.backward()
    result = Trainer(model, TrainConfig(learning_rate=1e-3)).train_step(ids, ids)
    assert result.loss == pytest.approx(loss.item(), rel=1e-5)
    norm = np.sqrt(sum((tensor.grad ** 2).sum().item() for tensor in tensors.values()))
    assert result.grad_norm == pytest.approx(norm, rel=1e-5)


def test_a_prompt_by_blocks_answers_the_same(by_blocks):
    """Logits after the prompt, and after the next token, which reads the cache."""
    model = TeleChat(small_config(initializer_range=0.2, num_key_value_heads=2), kernels="portable")
    prompt = np.random.default_rng(0).integers(4, 96, 43).tolist()
    logits = []
    for on in (False, True):
        by_blocks(on)
        engine = Engine(model, 64)
        engine.reserve(2, 64)
        logits.append(np.stack([engine.prefill([1], [prompt])[0], engine.decode([0, 1], [5, 7], [0, 43])[1]]))
    assert np.abs(logits[0] - logits[1]).max() <= 1e-5 * np.abs(logits[0]).max()


@pytest.mark.parametrize("fields", [dict(num_key_value_heads=2), dict(position_embedding="alibi")],
                         ids=["grouped heads", "alibi"])
def test_a_model_evaluates_the_same_by_blocks(by_blocks, monkeypatch, fields):
    """Logits with left padding, and the losses that evaluation sums; no scores of the whole sequence."""
    from telechat.evaluation.forward import Forward
    from telechat.nn import portable_kernels

    model = TeleChat(small_config(initializer_range=0.2, **fields), kernels="portable")
    ids = np.random.default_rng(0).integers(4, 96, (2, 43))
    shown = np.ones_like(ids)
    shown[1, :11] = 0
    outcomes, whole = [], portable_kernels.attention
    for on in (False, True):
        by_blocks(on)
        if on:
            monkeypatch.setattr(portable_kernels, "attention", None)
        sums, counts = Forward(model).losses(ids.tolist(), ids.tolist())
        outcomes.append((model(ids, shown).asnumpy()[shown == 1], Forward(model).last_logits(ids.tolist()), sums))
    monkeypatch.setattr(portable_kernels, "attention", whole)
    for one, other in zip(*outcomes):
        assert np.abs(one - other).max() <= 1e-5 * np.abs(one).max()


def test_evaluation_by_blocks_equals_torch(by_blocks):
    by_blocks(True)
    model = TeleChat(small_config(initializer_range=0.2), kernels="portable")
    ids = np.random.default_rng(0).integers(4, 96, (2, 43))
    tensors = {name: tensor.double() for name, tensor in as_torch(model).items()}
    reference = TorchTeleChat(model.config.to_dict(), tensors)
    expected = reference(torch.tensor(ids)).numpy()
    assert np.abs(model(ids).asnumpy() - expected).max() <= 2e-5 * np.abs(expected).max()
