"""The estimate of time: its products against what torch counts, what ranks send, predictions and the search among meshes."""

import dataclasses
import math

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from telechat import TeleChatConfig
from telechat.checkpoint.layout import parameter_shapes
from telechat.parallel import estimate_speed
from telechat.parallel.estimate import FLOAT32, stage_parts
from telechat.parallel.estimate_peak import stage_memory
from telechat.parallel.estimate_speed import Hardware, predict, search, step_flops, traffic
from tests.parallel.test_estimate import SMALL, TIED, mesh, workload
from tests.torch_reference import TorchTeleChat

HARDWARE = Hardware(card_memory=64 * 10 ** 9, card_flops=300e12, efficiency=0.5, link=100e9, node_link=20e9)


@pytest.mark.parametrize("model, length", [(SMALL, 12), (TIED, 8)])
def test_flops_equal_what_torch_counts(model, length):
    """Torch's counter sees every product of the plain torch model, forward and backward."""
    model = dataclasses.replace(model, num_key_value_heads=4)  # what the torch model computes
    torch.manual_seed(0)
    tensors = {name: torch.randn(shape, requires_grad=True)
               for name, shape in parameter_shapes(dataclasses.replace(model, use_bias=True)).items()}
    plain = TorchTeleChat({"n_head": model.n_head, "n_layer": model.n_layer, "hidden_size": model.hidden_size,
                           "training_seqlen": model.training_seqlen, "layer_norm_epsilon": 1e-5,
                           "tie_word_embeddings": model.tie_word_embeddings}, tensors)
    with FlopCounterMode(display=False) as counter:
        plain(torch.randint(0, model.vocab_size, (3, length))).sum().backward()
    assert step_flops(model, workload(length=length, batch=3)) == counter.get_total_flops()


def test_flops_of_an_adapter_beside_frozen_weights():
    """By hand: 4 a frozen weight, 6 a trained one, 12·S·heads·D a layer; and nothing of the model's is exchanged."""
    adapter = {"transformer.h.0.self_attention.query.lora_A.weight": (2, 32),
               "transformer.h.0.self_attention.query.lora_B.weight": (32, 2)}
    step = dataclasses.replace(workload(length=16, batch=8), adapter=adapter)
    full = step_flops(SMALL, workload(length=16, batch=8))
    attention = 12 * 16 * 32 * SMALL.n_layer * 16 * 8
    assert step_flops(SMALL, step) == (full - attention) * 4 // 6 + attention + 6 * 128 * SMALL.n_layer * 16 * 8
    data = [item for item in traffic(SMALL, mesh(data=2), step, 0) if item.group == "data"]
    assert [(item.purpose, item.calls, item.tensor_bytes) for item in data] == [
        ("gradients", 2 * SMALL.n_layer, 4 * 128 * SMALL.n_layer)]
    whole = [item for item in traffic(SMALL, mesh(tensor=2), step, 0) if "adapter" in item.purpose]
    assert [(item.calls, item.tensor_bytes) for item in whole] == [(SMALL.n_layer, 4 * 64 * SMALL.n_layer)]


def test_flops_of_the_ranks_add_up_to_the_step():
    """But for what is computed again: the scores, and with recomputation the blocks' forward pass."""
    step, parallel = workload(length=16, batch=8, micro=2), mesh(tensor=2, pipeline=2, data=2)
    again = 2 * 16 * 32 * 16 * 8 * SMALL.n_layer
    forward = 2 * SMALL.n_layer * (32 * 32 * 2 + 32 * 32 + 2 * 32 * 48 + 2 * 16 * 32) * 16 * 8  # no down product
    for recompute, extra in ((False, again), (True, again + forward)):
        settings = dataclasses.replace(parallel, recompute=recompute)
        total = sum(estimate_speed.stage_flops(SMALL, settings, step, stage) for stage in range(2))
        assert 2 * 2 * 2 * total == step_flops(SMALL, step) + extra  # tensor, data, micro-batches


def groups_of(parallel, stage=0, model=SMALL, step=None):
    return {item.group for item in traffic(model, parallel, step or workload(), stage)}


def test_there_is_no_communication_along_an_axis_of_one():
    assert traffic(SMALL, mesh(), workload(), 0) == []
    assert groups_of(mesh(tensor=2)) == {"tensor", "world"}
    assert groups_of(mesh(data=2)) == {"data", "world"}
    assert groups_of(mesh(pipeline=2)) == {"pipeline", "world"}
    assert groups_of(mesh(pipeline=2), model=TIED) == {"pipeline", "embedding", "world"}
    assert groups_of(mesh(pipeline=3), stage=1, model=TIED) == {"pipeline", "world"}


def sent(parallel, step):
    return sum(item.sent_bytes for item in traffic(SMALL, parallel, step, 0) if item.group != "world")


def test_a_sharded_optimizer_sends_what_plain_data_parallelism_does():
    """A reduce-scatter and a gather are the two halves of an all-reduce (arXiv:1910.02054, section 7.2)."""
    model = dataclasses.replace(SMALL, vocab_size=100)  # all rows divide
    gradients = stage_parts(model, mesh(), 0).parameters * FLOAT32
    for shard in (False, True):
        items = traffic(model, mesh(data=4, shard_optimizer=shard), workload(), 0)
        in_group = [item for item in items if item.group == "data"]
        assert sum(item.sent_bytes for item in in_group) == pytest.approx(2 * 3 / 4 * gradients)
        assert ("all-reduce" in {item.operation for item in in_group}) != shard


def test_gradients_are_reduced_once_a_step_and_tensors_once_a_micro_batch():
    for parallel, same in ((mesh(data=2), True), (mesh(tensor=2), False)):
        steps = [workload(length=8, batch=8 * micro, micro=micro) for micro in (1, 4)]
        one, four = (sent(parallel, step) for step in steps)
        assert (one == four) if same else (four == 4 * one)


def test_prediction_of_one_card_is_its_products_time():
    step = workload()
    prediction = predict(SMALL, mesh(), step, HARDWARE)
    assert prediction.seconds == estimate_speed.stage_flops(SMALL, mesh(), step, 0) / 150e12
    assert prediction.tokens_per_second == 8 * 16 / prediction.seconds
    assert prediction.waiting == prediction.communicating == 0


def test_prediction_of_equal_stages_has_the_papers_bubble():
    """(p − 1) / (m + p − 1) of a step, arXiv:2104.04473, where stages are equal and links fast."""
    model = dataclasses.replace(SMALL, vocab_size=1, n_layer=8)
    fast = dataclasses.replace(HARDWARE, link=math.inf, node_link=math.inf)
    prediction = predict(model, mesh(pipeline=4, stages=[2] * 4), workload(batch=16, micro=8), fast)
    assert prediction.waiting == pytest.approx(3 / 11, rel=0.01)


def test_links_and_latency_slow_a_step():
    parallel, step = mesh(tensor=4), workload()
    base = predict(SMALL, parallel, step, HARDWARE).seconds
    own = sent(parallel, step) + 2 * 3 / 4 * 24  # and six numbers: loss, norm and stop flag in two parts each
    slow = predict(SMALL, parallel, step, dataclasses.replace(HARDWARE, cards_per_node=2)).seconds
    assert slow - base == pytest.approx(own / 20e9 - own / 100e9)
    late = predict(SMALL, parallel, step, dataclasses.replace(HARDWARE, latency=1e-3)).seconds
    assert late - base == pytest.approx(1e-3 * sum(item.calls for item in traffic(SMALL, parallel, step, 0)))


def test_search_lists_what_fits_best_first(shared):
    model = TeleChatConfig.from_pretrained(shared / "data" / "telechat_12b.config.json")
    step = workload(length=1024, batch=16, width=2)
    fitting, others = search(model, 8, step, HARDWARE)
    assert fitting and others
    assert all(candidate.peak <= HARDWARE.card_memory for candidate in fitting)
    assert all(candidate.peak > HARDWARE.card_memory for candidate in others)
    speeds = [candidate.prediction.tokens_per_second for candidate in fitting]
    assert speeds == sorted(speeds, reverse=True)
    shapes = [(candidate.parallel.tensor, candidate.parallel.pipeline, candidate.parallel.data)
              for candidate in fitting + others]
    counts = (1, 2, 4, 8)
    expected = [(tensor, pipeline, 8 // tensor // pipeline) for tensor in counts for pipeline in counts
                if tensor * pipeline <= 8]
    assert sorted(shapes) == sorted(expected)
    for candidate in fitting:
        again = dataclasses.replace(step, micro_batches=candidate.micro_batches)
        assert step.batch_size % (candidate.micro_batches * candidate.parallel.data) == 0
        assert predict(model, candidate.parallel, again, HARDWARE) == candidate.prediction
        assert candidate.peak == max(stage_memory(model, candidate.parallel, again, stage).peak
                                     for stage in range(candidate.parallel.pipeline))


def test_search_leaves_out_meshes_that_the_model_or_the_batch_do_not_divide():
    fitting, others = search(SMALL, 12, workload(batch=2), HARDWARE)
    shapes = {(candidate.parallel.tensor, candidate.parallel.pipeline) for candidate in fitting + others}
    assert shapes == {(2, 3)}  # 2 key-value heads, 5 layers and a batch of 2: tensor and data 1 or 2
