"""What a training step and a token launch, copy and wait for, from the simulated card's log (simulator/report.py)."""

import pytest

from simulator.report import cut, read, report
from tests.conftest import save_small_model

PRODUCTS = ("aclnnMm", "aclnnAddmm", "aclnnMatmul", "aclnnBatchMatMul", "InternalMatMul")


def check_products(events, dtype="bfloat16"):
    """All products are of tensors of one dtype."""
    products = [event.details for event in events if event.kind == "launch" and event.name in PRODUCTS]
    other = {"bfloat16", "float32"} - {dtype}
    assert products and all(dtype in details and not any(name in details for name in other) for details in products)


@pytest.mark.parametrize("dtype, clip, forward, backward", [
    ("bfloat16", 1e-3, 16, 34), *(pytest.param(*values, marks=pytest.mark.ascend)
                                  for values in (("bfloat16", 0, 16, 34), ("float32", 1e-3, 36, 61), ("float32", 0, 36, 61)))])
def test_a_training_step(card, tmp_path, dtype, clip, forward, backward):
    """So many kernels a layer at most, in float32 without flash attention; the host waits once, to read, and sends ids,
    targets, weights and scalars alone."""
    log = tmp_path / "log"
    card("steps", 5, dtype, clip, SIM_LOG=str(log))
    events = read(str(log))
    check_products(events, dtype)
    found = report(events)
    assert (found.unit, found.count) == ("step", 3)
    assert 10 < sum(found.layer_forward.values()) <= forward, found.layer_forward
    assert 20 < sum(found.layer_backward.values()) <= backward, found.layer_backward
    assert found.synchronisations == 1
    assert found.copies["device to host"][0] == 1
    # Ids, rows that count, their targets and weights; what gradients are multiplied by where they are clipped; the update's step.
    clips = clip > 0
    assert found.copies["host to device"] == (5 + clips, 4 * 64 * 4 + 4 + 4 * clips)
    launches = [event.name for event in cut(events)[1][-1] if event.kind == "launch"]
    updates = launches[launches.index("aclnnApplyAdamWV2"):]
    tensors = 3 * 10 + 3  # 10 a layer, embedding, last norm and head
    assert updates.count("aclnnApplyAdamWV2") == launches.count("aclnnLinalgVectorNorm") == tensors
    assert launches.count("aclnnStack") == 1, "norms of all tensors are joined at once"
    if clip:
        assert set(updates) == {"aclnnApplyAdamWV2", "aclnnMul"} and len(updates) == 2 * tensors - 1
    elif dtype == "bfloat16":
        assert set(updates) == {"aclnnApplyAdamWV2", "aclnnCast"} and len(updates) < 2 * tensors, "MindSpore casts the gradients"
    else:
        assert set(updates) == {"aclnnApplyAdamWV2"}


@pytest.mark.ascend
def test_documents_of_a_training_step(card, tmp_path):
    """Where they end is read on the host, by every layer: nothing is fetched back for it, and there is one wait a step."""
    log = tmp_path / "log"
    card("steps", 5, "bfloat16", 1e-3, [[0] * 12 + [1] * 21, [0] * 30 + [1] * 3], SIM_LOG=str(log))
    found = report(read(str(log)))
    assert found.kernels["aclnnFlashAttentionVarLenScore"] == 6, found.kernels  # a layer forward, and again in its backward
    assert found.synchronisations == found.copies["device to host"][0] == 1


@pytest.mark.ascend
def test_the_head_works_in_chunks_for_a_card(card, tmp_path):
    """2,048 tokens of a vocabulary of 131,072: two chunks of 2**27 logits, each with one gradient of the head, where a CPU
    would make 64."""
    log = tmp_path / "log"
    card("wide_head", 131072, 2048, SIM_LOG=str(log), SIM_OPERATORS="none")
    events = cut(read(str(log)))[1][-1]
    launches = [event.name for event in events if event.kind == "launch"]
    assert launches.count("aclnnCrossEntropyLoss") == launches.count("aclnnCrossEntropyLossGrad") == 2
    sent = [event.bytes for event in events if event.kind == "copy" and event.name == "host to device"]
    # Ids; of each chunk's rows their places, targets and weights; the clipped norm and AdamW's step.
    assert sent == [2048 * 4, *[1024 * 4] * 3 * 2, 4, 4]


# What is sent for two tokens, 4 bytes each: ids, positions, lengths, blocks and places; on a plain cache blocks are of 16
# tokens, so four a sequence, and there are as many places as heads.
@pytest.mark.parametrize("dtype, layer, rest, sent", [("bfloat16", 14, 6, (5, 5 * 2 * 4)), pytest.param(
    "float32", 34, 12, (4, (2 + 4 + 4) * 2 * 4), marks=pytest.mark.ascend)])
def test_a_token(card, tmp_path, dtype, layer, rest, sent):
    """So many kernels a layer at most, and beside them, in float32 on a plain cache; the host waits once, to read, and sends
    token, position, place, block table and length alone."""
    log = tmp_path / "log"
    save_small_model(tmp_path / "model", hidden_size=64, n_layer=3)
    card("generation", str(tmp_path / "model"), [[4, 5, 6, 7, 8], [9, 10]], 8, dtype, SIM_LOG=str(log))
    events = read(str(log))
    check_products(events, dtype)
    found = report(events)
    assert found.unit == "token" and found.count >= 4
    assert 8 < sum(found.layer_forward.values()) <= layer, found.layer_forward
    assert sum(found.kernels.values()) <= 3 * layer + rest, found.kernels
    assert found.synchronisations == 1
    assert found.copies["device to host"][0] == 1
    assert found.copies["host to device"] == sent
    assert found.copies["device to device"][1] <= 16, "no cache is copied"
