"""The model is the official one: logits of the three tiny checkpoints, names, and the library's errors."""

import dataclasses
import json

import numpy as np
import pytest
import torch

from telechat import InputError, TeleChat, TeleChatConfig
from telechat.checkpoint.layout import parameter_shapes
from tests.torch_reference import TorchTeleChat


def small_config(**fields):
    return TeleChatConfig(**{**dict(vocab_size=96, hidden_size=32, n_layer=2, n_head=4, ffn_hidden_size=48), **fields})


def largest_difference(ours, theirs):
    """Relative to the largest absolute value of theirs."""
    return np.abs(np.asarray(ours) - theirs).max() / np.abs(theirs).max()


def as_torch(model):
    """The model's tensors for `TorchTeleChat`, which reads the canonical names as 12B's."""
    return {parameter.name: torch.tensor(parameter.asnumpy()) for parameter in model.get_parameters()}


def test_logits(reference):
    golden = reference.golden
    logits = reference.model()(golden["input_ids"])
    assert logits.shape == golden["logits"].shape
    assert str(logits.dtype) == "Float32"
    assert largest_difference(logits.asnumpy(), golden["logits"]) < 2e-5


def test_left_padded_logits(reference):
    golden, model = reference.golden, reference.model()
    if "padded_ids" in golden:
        ids, expected = golden["padded_ids"], golden["padded_logits"]
    else:
        # The official 52B code pads nothing; rotary positions are relative, so padding must not show.
        ids = golden["input_ids"][:1].copy()
        ids[0, :4] = model.config.pad_token_id
        expected = model(ids[:, 4:]).asnumpy()
    mask = np.ones_like(ids)
    mask[:, :4] = 0
    assert largest_difference(model(ids, mask).asnumpy()[:, 4:], expected) < 2e-5


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_low_precision_weights_compute_in_float32_on_cpu(reference, dtype):
    """The logits are those of a float32 model whose weights were rounded."""
    low, rounded = reference.model(dtype), reference.model()
    assert {str(parameter.dtype).lower() for parameter in low.get_parameters()} == {dtype}
    for parameter in rounded.get_parameters():
        values = torch.tensor(parameter.asnumpy()).to(getattr(torch, dtype)).float().numpy()
        parameter.asnumpy()[...] = values
    ids = reference.golden["input_ids"]
    assert largest_difference(low(ids).asnumpy(), rounded(ids).asnumpy()) < 2e-5


def test_grouped_key_value_heads_repeat_each_head():
    """A model with 2 key-value heads equals one with 4 whose heads are those, each twice."""
    config = small_config(num_key_value_heads=2)
    grouped = TeleChat(config)

    def tensors(name, shape):
        value = {parameter.name: parameter for parameter in grouped.get_parameters()}[name].asnumpy()
        if "key_value" in name:
            value = np.repeat(value.reshape(2, 16, 32), 2, axis=0).reshape(64, 32)
        return value

    full = TeleChat(dataclasses.replace(config, num_key_value_heads=4), tensors=tensors)
    ids = np.arange(14).reshape(2, 7)
    assert largest_difference(grouped(ids).asnumpy(), full(ids).asnumpy()) < 1e-6


def test_alibi_equals_torch():
    model = TeleChat(small_config(position_embedding="alibi", initializer_range=0.2))
    ids = np.random.default_rng(0).integers(0, 96, (2, 33))
    expected = TorchTeleChat(model.config.to_dict(), as_torch(model))(torch.tensor(ids)).numpy()
    assert largest_difference(model(ids).asnumpy(), expected) < 2e-5


def test_random_weights_follow_initializer_range():
    model = TeleChat(small_config(hidden_size=128, ffn_hidden_size=256, initializer_range=0.05), seed=3)
    weights = {parameter.name: parameter.asnumpy() for parameter in model.get_parameters()}
    drawn = np.concatenate([value.ravel() for value in weights.values() if value.ndim > 1])
    # 5 standard errors of a mean and of a standard deviation.
    assert abs(drawn.mean()) < 5 * 0.05 / drawn.size ** 0.5
    assert abs(drawn.std() / 0.05 - 1) < 5 / (2 * drawn.size) ** 0.5
    assert all(np.all(value == (0 if name.endswith("bias") else 1)) for name, value in weights.items()
               if value.ndim == 1)
    again = {parameter.name: parameter.asnumpy() for parameter in TeleChat(model.config, seed=3).get_parameters()}
    assert all(np.array_equal(weights[name], again[name]) for name in weights)


def test_parameters_have_the_published_names_and_shapes(reference):
    model = reference.model()
    assert {p.name: tuple(p.shape) for p in model.get_parameters()} == parameter_shapes(model.config)


def test_save_and_load(reference, tmp_path):
    model = reference.model()
    model.save_pretrained(tmp_path / "saved")
    again = TeleChat.from_pretrained(tmp_path / "saved")
    ids = reference.golden["input_ids"]
    assert np.array_equal(model(ids).asnumpy(), again(ids).asnumpy())
    published = json.loads((reference.official / "config.json").read_text())
    assert json.loads((tmp_path / "saved" / "config.json").read_text()) == published


@pytest.mark.parametrize("ids, words", [
    ([[1, 96]], "96"), ([[-1, 2]], "-1"), ([1, 2], "shape"), ([[1.5, 2.0]], "whole numbers"), (np.zeros((1, 0), int), "shape"),
])
def test_wrong_ids_are_refused(ids, words):
    with pytest.raises(InputError, match=words):
        TeleChat(small_config())(np.array(ids))


def test_wrong_mask_and_dtype_are_refused():
    with pytest.raises(InputError, match="attention_mask"):
        TeleChat(small_config())([[1, 2, 3]], np.ones((1, 2)))
    with pytest.raises(InputError, match="float64"):
        TeleChat(small_config(), "float64")
