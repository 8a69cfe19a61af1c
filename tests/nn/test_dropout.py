"""Dropout masks: the generator, rate, scaling, and that they depend on where they are used and on nothing else."""

import numpy as np
import pytest

from telechat.nn.dropout import Place, dropout_mask, keep_scale, philox

PLACE = Place(seed=1, step=2, sequences=[3], layer=4)


@pytest.mark.parametrize("counter, key, expected", [
    ([0] * 4, [0] * 2, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ([0xffffffff] * 4, [0xffffffff] * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ([0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344], [0xa4093822, 0x299f31d0], "d16cfe09 94fdcceb 5001e420 24126ea1"),
])
def test_known_answers(counter, key, expected):
    # Of Random123, the authors' own library: kat_vectors, philox4x32 10.
    assert " ".join(f"{word:08x}" for word in philox(counter, key)) == expected


def test_a_value_is_what_the_documentation_says():
    seed, step, sequence, layer, stream, rate = (5 << 32) + 7, 11, 13, 3, 9, 0.3
    mask = dropout_mask(5, 13, rate, Place(seed, step, [sequence], layer), [stream])[0, 0]
    for row, column in ((0, 0), (2, 7), (4, 12)):
        words = philox((row * 2 + column // 8, sequence, layer * 65536 + stream, step), (7, 5))
        lane = column % 8
        value = int(words[lane // 2]) >> 16 if lane % 2 else int(words[lane // 2]) & 0xffff
        assert mask[row, column] == (np.float32(65536 / (65536 - 19661)) if value >= 19661 else 0)


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
def test_rate_and_scaling(rate):
    mask = dropout_mask(1000, 300, rate, PLACE, [2])[0, 0]
    assert mask.dtype == np.float32
    assert set(np.unique(mask)) == {0, np.float32(keep_scale(rate))}
    assert keep_scale(rate) == pytest.approx(1 / (1 - rate), rel=1e-4)
    # The share dropped, within 5 standard errors of a binomial share.
    assert abs((mask == 0).mean() - rate) < 5 * (rate * (1 - rate) / mask.size) ** 0.5
    # Rows and columns alike: no pattern along an axis (7 standard errors for 1,300 shares).
    for axis, count in ((0, 1000), (1, 300)):
        assert np.abs((mask == 0).mean(axis) - rate).max() < 7 * (rate * (1 - rate) / count) ** 0.5


def test_no_dropout():
    assert dropout_mask(4, 4, 0.0, PLACE, [2]) is None


def test_a_mask_is_a_function_of_its_place():
    mask = dropout_mask(64, 64, 0.5, PLACE, [2])
    assert np.array_equal(mask, dropout_mask(64, 64, 0.5, PLACE, [2]))
    keys = PLACE.keys([2])
    others = [PLACE._replace(**{name: value + 1})
              for name, value in PLACE._asdict().items() if name != "sequences"] + [PLACE._replace(sequences=[4])]
    for place, streams in [*((place, [2]) for place in others), (PLACE, [3])]:
        assert 0.4 < (mask != dropout_mask(64, 64, 0.5, place, streams)).mean() < 0.6, (place, streams)
        keys += place.keys(streams)
    assert len(set(keys)) == 6 and all(0 <= key < 2 ** 63 for key in keys)
    # Several at a time are the same masks.
    several = dropout_mask(64, 64, 0.5, PLACE._replace(sequences=[2, 3]), [1, 2, 3])
    assert several.shape == (2, 3, 64, 64) and np.array_equal(several[1:, 1:2], mask)
    assert PLACE._replace(sequences=[2, 3]).keys([1, 2, 3])[4] == keys[0]
