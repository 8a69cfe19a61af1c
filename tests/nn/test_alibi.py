"""ALiBi against its formula in float64."""

import numpy as np
import pytest

from telechat.nn.alibi import alibi_bias, alibi_slopes


@pytest.mark.parametrize("heads", [1, 4, 8, 12])
def test_slopes(heads):
    expected = [2.0 ** (-8.0 * i / heads) for i in range(1, heads + 1)]
    assert np.allclose(alibi_slopes(heads), expected, rtol=1e-6, atol=0)


def test_bias():
    bias = alibi_bias(8, np.arange(5, 8), np.arange(8))
    assert bias.shape == (8, 3, 8)
    for head in range(8):
        for row, query in enumerate(range(5, 8)):
            for key in range(query + 1):
                assert bias[head, row, key] == pytest.approx(-(2.0 ** -(head + 1)) * (query - key), rel=1e-6)
