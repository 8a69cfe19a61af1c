"""What attention and the loss have to know of the tokens, on the simulated card against the CPU's portable kernels."""

import numpy as np
import pytest

from tests.ascend.on_card import FEATURES, dropout, feature, overflows
from tests.conftest import save_small_model

PLAIN = [name for name in FEATURES if "dropout" not in name]


@pytest.mark.ascend
@pytest.mark.parametrize("dtype, tolerance", [("bfloat16", 0.03), ("float16", 0.01)])
def test_features(card, dtype, tolerance):
    """Three steps: the losses, and the first norm, which rounding the weights to bfloat16 alone moves by 2 %."""
    found = card("features", PLAIN, dtype)
    for name in PLAIN:
        expected = np.array(feature(name, "float32"))
        assert np.abs(np.array(found[name]) / expected - 1)[:, 0].max() < tolerance, name
        assert np.abs(np.array(found[name]) / expected - 1)[0, 1] < 2 * tolerance, name


@pytest.mark.ascend
def test_dropout_is_drawn_by_place(card):
    """The same numbers twice; another seed's mask would change the loss by far more than rounding."""
    names = [name for name in FEATURES if "dropout" in name]
    first, second = (card("features", names, "bfloat16") for _ in range(2))
    assert first == second
    for name in names:
        fields, settings, packed = FEATURES[name]
        without = feature("documents" if packed else "grouped heads", "float32")
        losses = np.array(first[name])[:, 0]
        assert np.isfinite(losses).all() and losses[-1] < losses[0]
        assert abs(losses[0] / without[0][0] - 1) < 0.5


@pytest.mark.ascend
@pytest.mark.parametrize("dtype, tolerance", [("float32", 1e-4), ("bfloat16", 4e-3)])
def test_dropout_computes_what_its_masks_say(card, dtype, tolerance):
    """The card's masks in the CPU's portable kernels give its losses and its gradients' norm: what is kept is scaled by
    1/(1 − rate), and the backward pass has the forward's bits, which a block that is computed again draws once more."""
    found = card("dropout", dtype)
    assert found["traces"][0] == found["traces"][1], "with recomputation"
    expected = np.array(dropout("float32", found["masks"])["traces"])
    apart = np.abs(np.array(found["traces"]) / expected - 1)
    assert apart[..., 0].max() < tolerance and apart[:, 0, 1].max() < 2 * tolerance
    masks = {rate: [np.array(mask) for key, mask in found["masks"].items() if key.startswith("attention") == (rate == 0.2)]
             for rate in (0.1, 0.2)}
    for rate, arrays in masks.items():
        dropped = np.concatenate([mask.ravel() for mask in arrays]) == 0
        assert abs(dropped.mean() - rate) < 5 * (rate * (1 - rate) / dropped.size) ** 0.5
        assert len({mask.tobytes() for mask in arrays}) == len(arrays), "no mask twice"


@pytest.mark.ascend
def test_an_overflow_in_float16_backs_off(card):
    """The scale is halved until the gradients fit, the batch is not lost, and nothing else changes; as on a CPU."""
    scales = [2.0 ** 24, 2.0 ** 8]
    (overflowed, calm), unfinished = card("overflows", scales)
    on_cpu = overflows(scales)
    for found, expected in zip((overflowed, calm), on_cpu[0], strict=True):
        for step, other in zip(found, expected, strict=True):
            assert step[:2] == pytest.approx(other[:2], rel=0.01) and not step[4]
    assert overflowed[0][3] > 0 and overflowed[0][2] == 2.0 ** (24 - overflowed[0][3]) and overflowed[1][3] == 0
    assert [step[2:] for step in calm] == [[2.0 ** 8, 0, False]] * 2
    assert overflowed[0][:2] == pytest.approx(calm[0][:2], rel=2e-3)
    assert unfinished == [True, 2, 2.0 ** 8, 0] == on_cpu[1]


@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.ascend)])
def test_weights_left_on_the_host_stop_the_run(card, dtype):
    said = card("faults", dtype)
    assert said[0].startswith("transformer.") and "in host memory, where a graph's updates are lost" in said[0]
    if dtype == "float32":  # in lower dtypes the masters are computed, so they are on the card
        assert said[1] == ("after update 1 transformer.word_embeddings.weight is not its float32 master weight, rounded to "
                           "float32; the run stops: try tools/doctor.py")


@pytest.mark.ascend
def test_who_launches_changes_nothing(card, tmp_path):
    """On hosts with many cores MindSpore's own threads do, on others the thread that calls; streams that wait at random."""
    save_small_model(tmp_path / "model", hidden_size=64)
    prompts = [[4, 5, 6, 7, 8], [9, 10]]
    found = [[card("steps", 3, "bfloat16", 1.0, MS_DEV_HOST_BLOCKING_RUN=blocking, SIM_DELAY="1"),
              card("generation", str(tmp_path / "model"), prompts, 8, "bfloat16", MS_DEV_HOST_BLOCKING_RUN=blocking, SIM_DELAY="1")]
             for blocking in "10"]
    assert found[0] == found[1]
