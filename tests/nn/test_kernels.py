"""Each kernel, forward and backward, against torch."""

import os

import mindspore as ms
import numpy as np
import pytest
import torch
from mindspore import Tensor, ops

from telechat import InputError
from telechat.nn import kernel_choice, log
from telechat.nn import kernels as kernels_module
from telechat.nn import portable_kernels as kernels
from telechat.nn.kernels import Kernels
from tests.test_model import small_config

RANDOM = np.random.default_rng(7)


def draw(*shape):
    return RANDOM.standard_normal(shape).astype(np.float32)


def compare(ours, theirs, *arrays, rtol=2e-5):
    """Results and gradients in every array of two functions; the output is weighted with fixed numbers."""
    tensors = [torch.tensor(array, requires_grad=True) for array in arrays]
    expected = theirs(*tensors)
    weights = np.random.default_rng(1).standard_normal(expected.shape).astype(np.float32)
    expected.backward(torch.tensor(weights))
    inputs = [Tensor(array) for array in arrays]
    actual = ours(*inputs)
    gradients = ops.GradOperation(get_all=True, sens_param=True)(ours)(*inputs, Tensor(weights))
    pairs = [(actual, expected), *zip(gradients, (tensor.grad for tensor in tensors))]
    for mine, reference in pairs:
        reference = reference.detach().numpy()
        assert np.abs(mine.asnumpy() - reference).max() <= rtol * np.abs(reference).max()


def test_linear():
    compare(lambda x, w, b: kernels.linear(x, w, b), torch.nn.functional.linear, draw(5, 8), draw(6, 8), draw(6))


def test_rms_norm():
    compare(lambda x, w: kernels.rms_norm(x, w, 1e-5), lambda x, w: torch.nn.functional.rms_norm(x, (16,), w, 1e-5),
            draw(5, 16), draw(16))


def test_swiglu():
    compare(kernels.swiglu, lambda gate, up: torch.nn.functional.silu(gate) * up, draw(4, 9), draw(4, 9))


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_causal_attention(kv_heads):
    mask = np.where(np.tri(7, dtype=bool), 0, kernels.MASKED).astype(np.float32)[None, None]

    def theirs(q, k, v):
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.3, enable_gqa=True)

    def ours(q, k, v):
        return kernels.attention(q, k, v, Tensor(mask), 0.3)

    compare(ours, theirs, draw(2, 4, 7, 8), draw(2, kv_heads, 7, 8), draw(2, kv_heads, 7, 8))


def test_attention_dropout_multiplies_probabilities():
    drop = (RANDOM.random((2, 4, 7, 7)) > 0.3).astype(np.float32) / 0.7

    def theirs(q, k, v):
        return (torch.softmax(q @ k.transpose(2, 3) * 0.3, -1) * torch.tensor(drop)) @ v

    def ours(q, k, v):
        return kernels.attention(q, k, v, Tensor(np.zeros((1, 1, 7, 7), np.float32)), 0.3, Tensor(drop))

    compare(ours, theirs, draw(2, 4, 7, 8), draw(2, 4, 7, 8), draw(2, 4, 7, 8))


@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("dropout", [False, True])
def test_attention_in_training(dropout, kv_heads):
    length = 7
    drop = (RANDOM.random((2, 4, length, length)) > 0.3).astype(np.float32) / 0.7 if dropout else None
    hidden = np.where(np.tri(length, dtype=bool), 0, kernels.MASKED).astype(np.float32)
    query, key, value = draw(2, 4, length, 8), draw(2, kv_heads, length, 8), draw(2, kv_heads, length, 8)
    dattended = draw(2 * length, 32)

    tensors = [torch.tensor(array, requires_grad=True) for array in (query, key, value)]
    keys, values = (tensor.repeat_interleave(4 // kv_heads, 1) for tensor in tensors[1:])
    weights = torch.softmax(tensors[0] @ keys.transpose(2, 3) * 0.3 + torch.tensor(hidden), -1)
    weights = weights if drop is None else weights * torch.tensor(drop)
    expected = (weights @ values).transpose(1, 2).reshape(2 * length, 32)
    expected.backward(torch.tensor(dattended))

    heads = list(map(Tensor, (query, key, value)))
    last = Tensor(hidden[None, None]), None, None, 0.3, None if drop is None else Tensor(drop)
    both = Kernels()
    attended, log_sums = both.attention_in_training(*heads, *last)
    gradients = both.attention_backward(Tensor(dattended), attended, *heads, log_sums, *last)
    for mine, reference in [(attended, expected), *zip(gradients, (tensor.grad for tensor in tensors))]:
        reference = reference.detach().numpy()
        assert np.abs(mine.asnumpy() - reference).max() <= 2e-5 * np.abs(reference).max()


def test_heads_are_split_and_merged():
    def heads(x):
        return x.reshape(2, 7, -1, 8).transpose(1, 2)

    compare(lambda x: kernels.split_heads(x, 7, 8), heads, draw(14, 24))
    compare(kernels.merge_heads, lambda x: x.transpose(1, 2).reshape(14, 24), draw(2, 3, 7, 8))
    for part in range(2):
        compare(lambda x: kernels.split_key_value(x, 7, 8)[part],
                lambda x: x.reshape(2, 7, -1, 2, 8)[:, :, :, part].transpose(1, 2), draw(14, 48))


def test_rotate_turns_pairs_by_the_angle():
    """As complex numbers: the halves of a head, multiplied by e^(i·angle)."""
    angles = draw(1, 1, 5, 4)
    cos, sin = (np.tile(function(angles), (1, 1, 1, 2)) for function in (np.cos, np.sin))

    def theirs(x):
        turned = torch.complex(x[..., :4], x[..., 4:]) * torch.polar(torch.ones_like(torch.tensor(angles)),
                                                                     torch.tensor(angles))
        return torch.cat((turned.real, turned.imag), -1)

    compare(lambda x: kernels.rotate(x, Tensor(cos), Tensor(sin)), theirs, draw(2, 3, 5, 8))


def test_token_cross_entropy():
    logits = draw(6, 11) * 30
    labels, weights = np.array([0, 10, 3, 3, 7, 1], np.int32), np.array([.5, 0, 1, .25, 2, 0], np.float32)
    theirs = torch.tensor(logits, requires_grad=True)
    expected = (torch.nn.functional.cross_entropy(theirs, torch.tensor(labels).long(), reduction="none")
                * torch.tensor(weights)).sum()
    expected.backward()
    losses, gradient = kernels.token_cross_entropy(Tensor(logits), Tensor(labels), Tensor(weights))
    assert losses.asnumpy().sum() == pytest.approx(expected.item(), rel=1e-6)
    assert np.abs(gradient.asnumpy() - theirs.grad.numpy()).max() < 1e-6


def test_the_device_chooses(monkeypatch):
    config = small_config(hidden_size=64)
    here = kernel_choice.choose_kernels(config, ms.bfloat16)
    assert (here.fused, here.flash, here.paged, here.dtype) == (False, False, False, ms.float32)
    monkeypatch.setattr(kernel_choice, "on_cpu", lambda: False)
    trains = kernel_choice.choose_kernels(config, ms.bfloat16)
    assert (trains.fused, trains.flash, trains.paged, trains.dtype) == (True, True, False, ms.bfloat16)
    with pytest.raises(InputError, match="use_paged_attention is true and this process was not prepared for inference"):
        kernel_choice.choose_kernels(config, ms.bfloat16, use_paged_attention=True)
    monkeypatch.setattr(kernel_choice, "has_inference_kernels", lambda: True)
    there = kernel_choice.choose_kernels(config, ms.bfloat16)
    assert (there.fused, there.flash, there.paged, there.dtype) == (True, True, True, ms.bfloat16)
    assert not kernel_choice.choose_kernels(config, ms.bfloat16, use_paged_attention=False).paged
    forced = kernel_choice.choose_kernels(config, ms.bfloat16, "portable")
    assert (forced.fused, forced.flash, forced.paged, forced.dtype) == (False, False, False, ms.bfloat16)
    without = kernel_choice.choose_kernels(config, ms.bfloat16, use_flash_attention=False)
    assert (without.fused, without.flash, without.paged) == (True, False, True)


@pytest.mark.parametrize("cores, card, here", [(16, True, False), (16, False, True), (7, True, True)])
def test_who_launches_is_decided_when_the_device_is_known(monkeypatch, cores, card, here):
    """A program with a card and cores enough for MindSpore's threads may choose the CPU after it imported this library."""
    monkeypatch.delenv("MS_DEV_HOST_BLOCKING_RUN", raising=False)
    monkeypatch.setattr(kernels_module, "own_cores", lambda: cores)
    monkeypatch.setattr(kernels_module, "on_cpu", lambda: not card)
    kernel_choice.choose_kernels(small_config(hidden_size=64), ms.float32)
    assert os.environ.get("MS_DEV_HOST_BLOCKING_RUN") == ("1" if here else None)


@pytest.mark.parametrize("fields, dtype, flash, words", [
    (dict(hidden_size=96), ms.bfloat16, False, "multiple of 16"),
    (dict(hidden_size=64), ms.float32, False, "float16 and bfloat16"),
    (dict(hidden_size=64, position_embedding="alibi"), ms.bfloat16, True, "PagedAttention takes no ALiBi"),
])
def test_what_a_fused_operation_cannot_serve_is_said_once(monkeypatch, capsys, fields, dtype, flash, words):
    monkeypatch.setattr(log, "_said", set())
    for _ in range(2):
        chosen = kernel_choice.choose_kernels(small_config(**fields), dtype, "ascend")
        assert (chosen.fused, chosen.flash, chosen.paged) == (True, flash, False)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == len(set(lines)) and any(words in line for line in lines)
    if not flash:
        with pytest.raises(InputError, match=f"use_flash_attention.*{words}"):
            kernel_choice.choose_kernels(small_config(**fields), dtype, "ascend", use_flash_attention=True)


@pytest.mark.parametrize("arguments, words", [
    (("gpu",), "kernels"), ((None, "yes"), "use_flash_attention"), ((None, True), "a CPU has no such kernel"),
    (("portable", True), "use_flash_attention"), ((None, None, 1.5), "use_paged_attention must be true or false"),
    ((None, None, True), "use_paged_attention is true and a CPU has no such kernel"),
])
def test_wrong_choices_are_refused(arguments, words):
    with pytest.raises(InputError, match=words):
        kernel_choice.choose_kernels(small_config(), ms.float32, *arguments)


def test_ascend_kernels_do_not_run_on_a_cpu():
    with pytest.raises(InputError, match="cannot run on a CPU"):
        kernel_choice.choose_kernels(small_config(hidden_size=64), ms.bfloat16, "ascend").require_device()
