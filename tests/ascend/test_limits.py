"""Limits of CANN's operations that have no check of our own: the card refuses what is outside, and our calls stay inside.

Those with a check of our own (flash and paged attention, quantised products, the cache) are in tests/simulator.
"""

import pytest

# Of each of limits_on_card.limits: words of the refusal. A few MindSpore itself refuses, before the card is asked.
REFUSALS = {
    "heads before few tokens": "in BNSD, B·N = 40 must not be above 8·S = 16",
    "rotary tables of another dtype": "cos is float32, must be one of bfloat16",
    "labels of 32 bits": "target is int32, must be one of int64",
    "gradients of another dtype than the logits": "gradLoss is bfloat16, must be one of float32",
    "a step of several elements": "step must have one element, not 2",
    "a step of 32 bits": "step is int32, must be one of float32, int64",
    "moments of another dtype": "mRef is bfloat16, must be one of float32",
    "a gradient wider than the weight": "BFloat16, which cannot be converted to data type Float32",
    "a dropout mask cut at its bytes": "mask has 24 bytes, 32 are needed",
    "a rate above 1": "prob must be in 0 to 1, not 1.5",
    "a dropout mask for whole numbers": "the dtype must be in [Float32, Float16, BFloat16], but got Int32",
    "a norm's weight narrower than its input": "gamma must be float32 or of x's dtype",
    "a norm's weight of another width": "Each dimension of [gamma] must be aligned",
    "a sum of two dtypes in a norm": "x2 is float32, must be one of bfloat16",
    "halves that are none": "must be divisible by 2, but got x_shape[dim]: 5",
    "factors of two dtypes": "the type of 'x2' should be same as 'x1'",
}


@pytest.fixture(scope="module")
def answers(card):
    return card("limits_on_card.limits")


def test_all_are_asked(answers):
    assert answers.keys() == REFUSALS.keys()


@pytest.mark.parametrize("limit", REFUSALS)
def test_a_limit(answers, limit):
    refusal, ours = answers[limit]
    assert ours is None
    assert refusal is not None and REFUSALS[limit] in refusal
