"""What a training step and a token launch, copy and wait for, from the simulated card's log (simulator/report.py)."""

from simulator.report import cut, read, report
from tests.conftest import save_small_model


PRODUCTS = ("aclnnMm", "aclnnAddmm", "aclnnMatmul", "aclnnBatchMatMul", "InternalMatMul")


def check_products(events):
    """All products are of bfloat16 tensors."""
    products = [event.details for event in events if event.kind == "launch" and event.name in PRODUCTS]
    assert products and all("bfloat16" in details and "float32" not in details for details in products)


def test_a_training_step(card, tmp_path):
    """At most 16 kernels a layer forward and 34 backward; the host waits once, to read, and sends ids, targets, weights and
    scalars alone."""
    log = tmp_path / "log"
    card("steps", 5, "bfloat16", SIM_LOG=str(log))
    events = read(str(log))
    check_products(events)
    found = report(events)
    assert (found.unit, found.count) == ("step", 3)
    assert 10 < sum(found.layer_forward.values()) <= 16, found.layer_forward
    assert 20 < sum(found.layer_backward.values()) <= 34, found.layer_backward
    assert found.synchronisations == 1
    assert found.copies["device to host"][0] == 1
    # Ids, rows that count, their targets and weights; the update's step.
    assert found.copies["host to device"] == (5, 4 * 64 * 4 + 4)
    launches = [event.name for event in cut(events)[1][-1] if event.kind == "launch"]
    updates = launches[launches.index("aclnnApplyAdamWV2"):]
    tensors = 3 * 10 + 3  # 10 a layer, embedding, last norm and head
    assert updates.count("aclnnApplyAdamWV2") == launches.count("aclnnLinalgVectorNorm") == tensors
    assert set(updates) == {"aclnnApplyAdamWV2", "aclnnCast"} and len(updates) < 2 * tensors, "MindSpore casts the gradients"


def test_a_token(card, tmp_path):
    """At most 14 kernels a layer and 6 more; the host waits once, to read, and sends token, position, place, block table and
    length alone."""
    log = tmp_path / "log"
    save_small_model(tmp_path / "model", hidden_size=64, n_layer=3)
    card("generation", str(tmp_path / "model"), [[4, 5, 6, 7, 8], [9, 10]], 8, "bfloat16", SIM_LOG=str(log))
    events = read(str(log))
    check_products(events)
    found = report(events)
    assert found.unit == "token" and found.count >= 4
    assert 8 < sum(found.layer_forward.values()) <= 14, found.layer_forward
    assert sum(found.kernels.values()) <= 3 * 14 + 6, found.kernels
    assert found.synchronisations == 1
    assert found.copies["device to host"][0] == 1
    assert found.copies["host to device"] == (5, 5 * 2 * 4)
    assert found.copies["device to device"] == (0, 0), "no cache is copied"
