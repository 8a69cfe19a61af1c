"""Dropout masks: rate, scaling, and that they depend on where they are used and on nothing else."""

import numpy as np
import pytest

from telechat.nn.dropout import dropout_mask


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
def test_rate_and_scaling(rate):
    mask = dropout_mask((1000, 300), rate, seed=1, step=2, micro_batch=0, layer=3, site=1)
    assert mask.dtype == np.float32
    assert set(np.unique(mask)) == {0, np.float32(1 / (1 - rate))}
    # The share dropped, within 5 standard errors of a binomial share.
    assert abs((mask == 0).mean() - rate) < 5 * (rate * (1 - rate) / mask.size) ** 0.5
    # Rows and columns alike: no pattern along an axis (7 standard errors for 1,300 shares).
    for axis, count in ((0, 1000), (1, 300)):
        assert np.abs((mask == 0).mean(axis) - rate).max() < 7 * (rate * (1 - rate) / count) ** 0.5


def test_no_dropout():
    assert dropout_mask((4,), 0.0, 0, 0, 0, 0, 0) is None


def test_a_mask_is_a_function_of_its_place():
    place = dict(seed=1, step=2, micro_batch=3, layer=4, site=2)
    mask = dropout_mask((64, 64), 0.5, **place)
    assert np.array_equal(mask, dropout_mask((64, 64), 0.5, **place))
    for name in place:
        other = dropout_mask((64, 64), 0.5, **{**place, name: place[name] + 1})
        assert 0.4 < (mask != other).mean() < 0.6, name
