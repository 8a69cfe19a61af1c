"""Rotary tables: the official values with NTK on, and the tables of decoding."""

import numpy as np
import pytest

from telechat import TeleChatConfig
from telechat.config import YarnScaling
from telechat.nn.positions import decoding_tables, sequence_tables
from telechat.nn.rotary import ntk_alpha, rotary_tables, yarn_frequencies


def test_official_rows(reference):
    """At the goldens' lengths: inside training_seqlen, far beyond it, and beyond it by no power of two."""
    golden = reference.golden
    config = TeleChatConfig.from_pretrained(reference.directory)
    for key in (name for name in golden if name.startswith("rope_") and name.endswith("pos")):
        kind = key[:-len("pos")]
        length = int(golden.get(kind + "seq_len", config.training_seqlen))
        tables = rotary_tables(config, golden[key], length)
        for ours, theirs in zip(tables, (golden[kind + "cos"], golden[kind + "sin"])):
            assert ours.dtype == np.float32 and ours.shape == theirs.shape
            # Rounded to float16: one step there, 2^-11 of the value's power of two.
            step = np.spacing(np.abs(theirs).astype(np.float16)).astype(np.float32)
            assert np.all(np.abs(ours - theirs) <= (step if config.rotary_float16 else 1e-6)), kind


def test_yarn_frequencies_and_factor(shared):
    golden = np.load(shared / "reference/telechat3_tiny/golden.npz")
    config = TeleChatConfig.from_pretrained(shared / "reference/telechat3_tiny")
    frequencies, factor = yarn_frequencies(config)
    assert np.array_equal(frequencies, golden["rope_inv_freq"])
    assert factor == float(golden["rope_attention_factor"])


@pytest.mark.parametrize("original, length, theta, dim", [(4096, 65536, 5e5, 64), (8192, 8192, 1e4, 16),
                                                          (100, 400, 1e6, 4)])
def test_yarn_in_float64(original, length, theta, dim):
    """The formula as the publisher's README of the goldens states it: factor by the lengths, truncated ends."""
    config = TeleChatConfig(vocab_size=8, hidden_size=32, n_layer=1, n_head=2, ffn_hidden_size=8, head_dim=dim,
                            training_seqlen=length, rotary_base=theta, rotary_ntk_context=None, rotary_float16=False,
                            yarn=YarnScaling(original, beta_fast=20.0, beta_slow=2.0), use_bias=False, style="llama")
    stretch = length / original
    low, high = (dim * np.log(original / (2 * np.pi * turns)) / (2 * np.log(theta)) for turns in (20.0, 2.0))
    low, high = max(np.floor(low), 0), min(np.ceil(high), dim - 1)
    ramp = np.clip((np.arange(dim // 2) - low) / (high - low if high != low else 0.001), 0, 1)
    frequency = theta ** (-np.arange(0, dim, 2) / dim)
    expected = ramp * frequency / stretch + (1 - ramp) * frequency
    frequencies, factor = yarn_frequencies(config)
    assert np.abs(frequencies / expected - 1).max() < 1e-6
    assert factor == pytest.approx(1 + 0.07 * np.log(stretch))


@pytest.mark.parametrize("length, alpha", [(1, 1), (4096, 1), (4097, 3), (8192, 3), (8193, 7), (16384, 7), (16385, 15)])
def test_ntk_alpha(length, alpha):
    assert ntk_alpha(length, 4096) == alpha


def test_formula_within_training_length():
    """cos and sin of position · base^(−2i/D) in float64, for a config without rounding or stretching."""
    config = TeleChatConfig(vocab_size=8, hidden_size=64, n_layer=1, n_head=4, ffn_hidden_size=8, rotary_float16=False)
    cos, sin = rotary_tables(config, np.arange(100), 100)
    angles = np.outer(np.arange(100), 10000.0 ** (-np.arange(0, 16, 2) / 16))
    assert np.abs(cos - np.cos(np.tile(angles, 2))).max() < 1e-5
    assert np.abs(sin - np.sin(np.tile(angles, 2))).max() < 1e-5


def test_decoding_rows_are_those_of_the_newest_token(reference):
    """Row p of the decoding tables is row p of a sequence of p + 1 tokens, past training_seqlen too."""
    config = TeleChatConfig.from_pretrained(reference.directory)
    limit = config.training_seqlen
    cos, sin = decoding_tables(config, limit + 40)
    for position in (0, 5, limit - 1, limit, limit + 39):
        expected = rotary_tables(config, np.arange(position + 1), position + 1)
        assert np.array_equal(cos[position], expected[0][position])
        assert np.array_equal(sin[position], expected[1][position])
    inside, beyond = (sequence_tables(config, length)[0][0, 0, 1] for length in (limit, limit + 1))
    stretched = config.yarn is None
    assert np.array_equal(inside, beyond) != stretched, "NTK stretches the tables past training_seqlen, YaRN does not"
