"""The training step: the official trace, micro-batches, dropout, position bias, evaluation, bad input."""

import dataclasses
import json
import types

import numpy as np
import pytest
import torch

from telechat import InputError, TrainConfig, Trainer, TeleChat
from telechat.nn.dropout import ATTENTION_OUTPUT, FEED_FORWARD_OUTPUT, Place, dropout_mask
from telechat.parallel.parallel_config import ParallelConfig
from telechat.training.step import _positions_within
from telechat.training.training_state import restore, save_training_checkpoint
from tests.test_model import as_torch, small_config
from tests.torch_reference import TorchTeleChat, torch_adamw

RECIPE = TrainConfig(learning_rate=1e-3, warmup_steps=2, total_steps=8, betas=(0.9, 0.95), eps=1e-8,
                     weight_decay=0.1, max_grad_norm=1.0)


def test_the_recipe_where_nothing_is_said():
    """Moments, decay and clipping of the official trace."""
    assert TrainConfig() == TrainConfig(betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1, max_grad_norm=1.0, micro_batches=1,
                                        mask_padding=False, document_mask=False, min_learning_rate=0.0)


def test_sums_over_processes_keep_float64_s_digits(monkeypatch):
    """Collectives take float32: a value goes as two of them."""
    monkeypatch.setattr("telechat.training.trainer.all_reduce", lambda tensor, group: tensor + tensor)
    trainer = Trainer(TeleChat(small_config()), TrainConfig())
    trainer.mesh = types.SimpleNamespace(world=types.SimpleNamespace(size=2))
    values = 0.1, 123456.789, 1e-7
    assert trainer._sum_over_world(*values) == pytest.approx([2 * value for value in values], rel=1e-13)


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_official_trace(reference, micro_batches):
    golden, model = reference.golden, reference.model()
    trainer = Trainer(model, dataclasses.replace(RECIPE, micro_batches=micro_batches))
    for step in range(8):
        result = trainer.train_step(golden["train_input_ids"][step], golden["train_labels"][step])
        assert result.loss == pytest.approx(golden["train_loss"][step], rel=1e-4)
        assert result.grad_norm == pytest.approx(golden["train_grad_norm"][step], rel=1e-4)
        assert result.learning_rate == pytest.approx(golden["train_lr"][step], rel=1e-4)
    logits = model(golden["train_input_ids"][0]).asnumpy()
    expected = golden["train_logits_after"]
    # TeleChat3's are as large as 10; what torch's own rounding does to them after 8 steps is 4e-5 of that.
    assert np.abs(logits - expected).max() < max(1e-4, 4.5e-5 * np.abs(expected).max())


def test_bfloat16_trace(reference):
    """Working weights in bfloat16 over float32 masters: losses within 2 % of the float32 ones."""
    golden, model = reference.golden, reference.model()
    trainer = Trainer(model, dataclasses.replace(RECIPE, dtype="bfloat16"))
    for step in range(8):
        result = trainer.train_step(golden["train_input_ids"][step], golden["train_labels"][step])
        assert result.loss == pytest.approx(golden["train_loss"][step], rel=0.02)
    assert {str(parameter.dtype) for parameter in model.get_parameters()} == {"BFloat16"}


def test_float16_trace(reference):
    """Loss scaling changes nothing that counts: losses within 2 % of the float32 ones, no overflow."""
    golden, model = reference.golden, reference.model()
    trainer = Trainer(model, dataclasses.replace(RECIPE, dtype="float16", loss_scale=1024.0, loss_scale_window=3))
    results = [trainer.train_step(golden["train_input_ids"][step], golden["train_labels"][step]) for step in range(8)]
    for step, result in enumerate(results):
        assert result.loss == pytest.approx(golden["train_loss"][step], rel=0.02)
        assert result.grad_norm == pytest.approx(golden["train_grad_norm"][step], rel=0.05)
    assert [result.loss_scale for result in results] == [1024.0] * 3 + [2048.0] * 3 + [4096.0] * 2, "it grows"
    assert {str(parameter.dtype) for parameter in model.get_parameters()} == {"Float16"}


def test_an_overflow_backs_off_and_loses_no_data():
    """A scale that float16 gradients cannot hold: the same batch is computed again until they fit."""
    ids = np.random.default_rng(0).integers(0, 96, (2, 24))
    trainers = []
    for scale in (2.0 ** 24, 2.0 ** 8):
        trainer = Trainer(TeleChat(small_config(initializer_range=0.2)),
                          dataclasses.replace(RECIPE, dtype="float16", loss_scale=scale))
        trainers.append((trainer, [trainer.train_step(ids, ids) for _ in range(2)]))
    (overflowed, first), (calm, second) = trainers
    assert first[0].overflows > 0 and not first[0].skipped
    assert first[0].loss_scale == 2.0 ** (24 - first[0].overflows) == overflowed.loss_scale.value
    assert second[0].overflows == 0 and second[0].loss_scale == 2.0 ** 8
    assert first[1].overflows == 0, "it starts from the scale that fitted"
    assert overflowed.optimizer.updates == calm.optimizer.updates == overflowed.step == 2
    for one, other in zip(first, second):
        assert one.loss == pytest.approx(other.loss, rel=2e-3)
        assert one.grad_norm == pytest.approx(other.grad_norm, rel=2e-3)


def test_a_loss_that_is_not_finite_is_no_overflow():
    """It is skipped, as in float32, and the scale stays."""
    model = TeleChat(small_config())
    trainer = Trainer(model, dataclasses.replace(RECIPE, dtype="float16"))
    model.transformer.ln_f.weight.asnumpy()[3] = np.nan
    ids = np.random.default_rng(0).integers(0, 96, (1, 12))
    result = trainer.train_step(ids, ids)
    assert result.skipped and result.overflows == 0 and trainer.loss_scale.value == 2.0 ** 16
    assert trainer.optimizer.updates == 0


def test_recompute_changes_no_number():
    """Losses, norms and weights after three steps to the last bit, with dropout and two micro-batches."""
    rng = np.random.default_rng(0)
    batches = rng.integers(0, 96, (3, 4, 24))
    kept = []
    for recompute in (False, True):
        model = TeleChat(small_config(hidden_dropout=0.2, attention_dropout=0.2))
        trainer = Trainer(model, dataclasses.replace(RECIPE, micro_batches=2), ParallelConfig(recompute=recompute))
        steps = [trainer.train_step(ids, ids) for ids in batches]
        kept.append((steps, [parameter.asnumpy().copy() for parameter in model.get_parameters()]))
    (steps, weights), (again, others) = kept
    assert steps == again
    assert all(np.array_equal(one, other) for one, other in zip(weights, others, strict=True))


def test_uneven_micro_batches_divide_by_the_count_of_the_whole_batch():
    """One half holds 1 counted token, the other 11: the loss is the mean over the 12."""
    rng = np.random.default_rng(0)
    ids = rng.integers(0, 96, (2, 12))
    labels = ids.copy()
    labels[0, :-1] = -100
    results = []
    for parts in (1, 2):
        trainer = Trainer(TeleChat(small_config(initializer_range=0.2)), dataclasses.replace(RECIPE, micro_batches=parts))
        results.append([trainer.train_step(ids, labels) for _ in range(2)])
    model = TeleChat(small_config(initializer_range=0.2))
    expected = TorchTeleChat(model.config.to_dict(), as_torch(model)).loss(torch.tensor(ids), torch.tensor(labels))
    assert results[0][0].tokens == 12
    assert results[0][0].loss == pytest.approx(expected.item(), rel=1e-5)
    for whole, cut in zip(*results):
        assert cut.loss == pytest.approx(whole.loss, rel=1e-5)
        assert cut.grad_norm == pytest.approx(whole.grad_norm, rel=1e-5)


@pytest.mark.parametrize("fields", [
    dict(position_embedding="alibi"),
    dict(hidden_dropout=0.1, attention_dropout=0.2),
    dict(hidden_dropout=0.3, attention_dropout=0.3, tie_word_embeddings=True, rotary_ntk_context=4096),
], ids=["alibi", "dropout", "tied with dropout"])
def test_training_equals_torch(fields):
    """Loss, gradient norm and weights over four steps; dropout masks are taken from the library."""
    model = TeleChat(small_config(initializer_range=0.2, **fields))
    config = model.config
    tensors = {name: tensor.clone().requires_grad_(True) for name, tensor in as_torch(model).items()}
    reference, optimizer = TorchTeleChat(config.to_dict(), tensors), torch_adamw(tensors, 0.1)
    trainer = Trainer(model, dataclasses.replace(RECIPE, seed=5))
    rng = np.random.default_rng(1)
    for step in range(4):
        ids = rng.integers(0, 96, (2, 18))

        def drops(layer):
            def mask(columns, rate, streams):
                array = dropout_mask(17, columns, rate, Place(5, step, range(2), layer), streams)
                return None if array is None else torch.tensor(array)
            outputs = [mask(config.hidden_size, config.hidden_dropout, [stream])
                       for stream in (ATTENTION_OUTPUT, FEED_FORWARD_OUTPUT)]
            return (mask(17, config.attention_dropout, range(4)),
                    *(None if output is None else output.reshape(2 * 17, -1) for output in outputs))

        result = trainer.train_step(ids, ids)
        # The last token predicts nothing: torch sees the 17 before it.
        logits = reference(torch.tensor(ids[:, :-1]), drops)
        loss = torch.nn.functional.cross_entropy(logits.reshape(-1, 96), torch.tensor(ids[:, 1:]).reshape(-1))
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(list(tensors.values()), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = result.learning_rate
        optimizer.step()
        assert result.loss == pytest.approx(loss.item(), rel=1e-4)
        assert result.grad_norm == pytest.approx(norm.item(), rel=1e-4)
    for parameter in model.get_parameters():
        # Adam's first steps move a weight by ±lr whatever the gradient's size: compare where it is not noise.
        difference = np.abs(parameter.asnumpy() - tensors[parameter.name].detach().numpy())
        assert np.quantile(difference, 0.99) < 1e-5, parameter.name


def test_evaluation_has_no_dropout_and_changes_nothing():
    model = TeleChat(small_config(initializer_range=0.2, hidden_dropout=0.5, attention_dropout=0.5))
    trainer = Trainer(model, RECIPE)
    ids = np.random.default_rng(0).integers(0, 96, (2, 12))
    before = {parameter.name: parameter.asnumpy().copy() for parameter in model.get_parameters()}
    expected = TorchTeleChat(model.config.to_dict(), as_torch(model)).loss(torch.tensor(ids), torch.tensor(ids)).item()
    assert trainer.evaluate([(ids, ids)]) == pytest.approx(expected, rel=1e-5)
    assert all(np.array_equal(before[p.name], p.asnumpy()) for p in model.get_parameters())
    assert trainer.train_step(ids, ids).loss != pytest.approx(expected, rel=1e-3), "training does drop"


def test_masked_padding_is_as_if_it_were_not_there():
    """Left pads that attention does not see: the loss and gradient of the sequence without them."""
    rng = np.random.default_rng(0)
    ids = rng.integers(4, 96, (1, 12))
    padded, labels = np.full((1, 20), 3), np.full((1, 20), -100)
    padded[:, 8:], labels[:, 9:] = ids, ids[:, 1:]

    def step(inputs, targets, **fields):
        # Tables that are not rounded: rotary positions are relative, rounded ones only nearly so.
        model = TeleChat(small_config(initializer_range=0.2, rotary_float16=False))
        return Trainer(model, dataclasses.replace(RECIPE, **fields)).train_step(inputs, targets)

    alone, masked, seen = step(ids, ids), step(padded, labels, mask_padding=True), step(padded, labels)
    assert masked.loss == pytest.approx(alone.loss, rel=1e-5)
    assert masked.grad_norm == pytest.approx(alone.grad_norm, rel=1e-4)
    assert abs(seen.loss - alone.loss) > 1e-3


@pytest.mark.parametrize("kernels", [None, "portable"])
def test_the_first_token_is_predicted_from_a_pad_alone(kernels):
    """Where it counts: not from the tokens to come, and however many pads there are before it."""
    ids, steps = np.random.default_rng(0).integers(4, 96, 12), []
    for pads in (1, 5):
        padded = np.full((1, pads + 12), 3)
        padded[0, pads:] = ids
        model = TeleChat(small_config(initializer_range=0.2, rotary_float16=False), kernels=kernels)
        trainer = Trainer(model, dataclasses.replace(RECIPE, mask_padding=True))
        steps.append(trainer.train_step(padded, np.where(padded == 3, -100, padded)))
    assert steps[0].tokens == steps[1].tokens == 12
    assert steps[0].loss == pytest.approx(steps[1].loss, rel=1e-5)
    assert steps[0].grad_norm == pytest.approx(steps[1].grad_norm, rel=1e-4)


@pytest.mark.parametrize("restart", [False, True])
def test_packed_conversations_kept_apart_are_as_if_each_were_alone(restart):
    """Two conversations in one row equal one row each, pads hidden; positions are relative either way."""
    rng = np.random.default_rng(0)
    first, second = rng.integers(4, 96, 7), rng.integers(4, 96, 9)
    packed, alone = np.full((1, 19), 3), np.full((2, 19), 3)
    packed_labels, alone_labels = np.full((1, 19), -100), np.full((2, 19), -100)
    packed[0, 3:] = np.concatenate([first, second])
    packed_labels[0, 4:10], packed_labels[0, 11:] = first[1:], second[1:]
    segment_ids = np.repeat([0, 1, 2], [3, 7, 9])[None]
    for row, ids in enumerate((first, second)):
        alone[row, -len(ids):], alone_labels[row, 1 - len(ids):] = ids, ids[1:]

    def step(*batch, **fields):
        model = TeleChat(small_config(initializer_range=0.2, rotary_float16=False))
        trainer = Trainer(model, dataclasses.replace(RECIPE, **fields))
        evaluation = trainer.evaluate([batch])
        return trainer.train_step(*batch), evaluation

    expected, expected_evaluation = step(alone, alone_labels, mask_padding=True)
    kept, evaluation = step(packed, packed_labels, segment_ids, document_mask=True, restart_positions=restart)
    mixed, _ = step(packed, packed_labels)
    assert kept.loss == pytest.approx(expected.loss, rel=1e-5)
    assert kept.grad_norm == pytest.approx(expected.grad_norm, rel=1e-4)
    assert evaluation == pytest.approx(expected_evaluation, rel=1e-5)
    assert abs(mixed.loss - expected.loss) > 1e-3


def test_positions_restart_in_each_document():
    assert _positions_within(np.array([[0, 0, 1, 1, 1, 2], [5, 5, 5, 5, 5, 5]])).tolist() == [[0, 1, 0, 1, 2, 0],
                                                                                             [0, 1, 2, 3, 4, 5]]


def test_published_7b_trains_with_dropout(shared):
    config = json.loads((shared / "data" / "telechat_7b.config.json").read_text())
    assert (config["hidden_dropout"], config["attention_dropout"]) == (0.1, 0.1)


def test_a_step_that_is_not_finite_is_skipped():
    model = TeleChat(small_config())
    trainer = Trainer(model, RECIPE)
    ids = np.random.default_rng(0).integers(0, 96, (1, 12))
    weight = model.transformer.ln_f.weight
    weight.asnumpy()[3] = np.nan
    before = [parameter.asnumpy().copy() for parameter in model.get_parameters()]
    result = trainer.train_step(ids, ids)
    assert result.skipped and trainer.step == 1 and trainer.optimizer.updates == 0
    assert all(np.array_equal(a, p.asnumpy(), equal_nan=True) for a, p in zip(before, model.get_parameters()))
    assert all(not tensor.asnumpy().any() for tensor in trainer.optimizer.state().values())
    weight.asnumpy()[3] = 1.0
    result = trainer.train_step(ids, ids)
    assert not result.skipped and trainer.optimizer.updates == 1


@pytest.mark.parametrize("ids, labels, words", [
    (np.zeros((3, 4), int), np.zeros((3, 4), int), "micro_batches 2"),
    (np.zeros((2, 4), int), np.zeros((2, 5), int), "labels have shape"),
    (np.zeros((2, 1), int), np.zeros((2, 1), int), "at least 2"),
    (np.full((2, 4), 96), np.zeros((2, 4), int), "token id 96"),
    (np.zeros((2, 4), int), np.full((2, 4), 96), "label"),
    (np.zeros((2, 4), int), np.full((2, 4), -1), "label"),
])
def test_wrong_batches_are_refused(ids, labels, words):
    trainer = Trainer(TeleChat(small_config()), dataclasses.replace(RECIPE, micro_batches=2))
    with pytest.raises(InputError, match=words):
        trainer.train_step(ids, labels)
    assert trainer.step == 0


def test_the_loss_scale_is_saved_and_restored(tmp_path):
    config = dataclasses.replace(RECIPE, dtype="float16")
    trainer, resumed = (Trainer(TeleChat(small_config()), config) for _ in range(2))
    trainer.loss_scale.value, trainer.loss_scale.good_steps = 32.0, 7
    restore(save_training_checkpoint(str(tmp_path), trainer, {}), resumed, {})
    assert (resumed.loss_scale.value, resumed.loss_scale.good_steps) == (32.0, 7)
