"""Rotary tables: the official values with NTK on, and the tables of decoding."""

import numpy as np
import pytest

from telechat import TeleChatConfig
from telechat.nn.positions import decoding_tables, sequence_tables
from telechat.nn.rotary import ntk_alpha, rotary_tables


def test_official_rows_at_16384(reference):
    golden = reference.golden
    config = TeleChatConfig.from_pretrained(reference.directory)
    tables = rotary_tables(config, golden["rope_pos"], int(golden["rope_seq_len"]))
    for ours, theirs in zip(tables, (golden["rope_cos"], golden["rope_sin"])):
        assert ours.dtype == np.float32 and ours.shape == theirs.shape
        # 7B and 12B round to float16: one step there, 2^-11 of the value's power of two.
        allowed = np.spacing(np.abs(theirs).astype(np.float16)).astype(np.float32) if config.rotary_float16 else 1e-6
        assert np.all(np.abs(ours - theirs) <= allowed)


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
    assert not np.array_equal(inside, beyond), "the tables are stretched past training_seqlen"
