"""The estimate's formulas against the real slices, tensors and products that they stand for."""

import dataclasses
import functools
import math
import re

import numpy as np
import pytest

from telechat import TeleChatConfig, TrainConfig
from telechat.checkpoint.layout import parameter_shapes
from telechat.parallel.estimate import FLOAT32, Workload, activation_bytes, optimizer_bytes, score_elements, stage_parts
from telechat.parallel.estimate_card import communicators
from telechat.parallel.estimate_cpu import index_tables
from telechat.parallel.estimate_peak import stage_memory
from telechat.parallel.parallel_config import ParallelConfig
from telechat.parallel.plan import local_slices, stage_layers

SMALL = TeleChatConfig(vocab_size=101, hidden_size=32, n_layer=5, n_head=4, num_key_value_heads=2,
                       ffn_hidden_size=48)
TIED = dataclasses.replace(SMALL, tie_word_embeddings=True, use_bias=False)


def mesh(tensor=1, pipeline=1, data=1, **settings):
    return ParallelConfig(tensor=tensor, pipeline=pipeline, data=data, **settings)


def workload(length=16, batch=8, micro=1, width=FLOAT32, rows=64, **settings):
    return Workload(length, batch, micro, width, width, functools.partial(min, rows), **settings)


def own_names(model, parallel, stage):
    """Names of the parameters of a stage, from their meaning."""
    layers, last = stage_layers(model, parallel)[stage], stage == parallel.pipeline - 1
    for name in parameter_shapes(model):
        layer = re.search(r"\.h\.(\d+)\.", name)
        if layer:
            held = int(layer[1]) in layers
        elif "word_embeddings" in name:
            held = stage == 0 or (last and model.tie_word_embeddings)
        else:
            held = last
        if held:
            yield name


@pytest.mark.parametrize("tensor, pipeline", [(1, 1), (8, 1), (8, 2), (4, 4), (2, 7), (16, 1)])
@pytest.mark.parametrize("size", ["7b", "12b", "52b"])
def test_parameters_of_the_published_models_equal_their_slices(shared, size, tensor, pipeline):
    model = TeleChatConfig.from_pretrained(shared / "data" / f"telechat_{size}.config.json")
    parallel, shapes = mesh(tensor, pipeline), parameter_shapes(model)
    seen = []
    for stage in range(pipeline):
        names = list(own_names(model, parallel, stage))
        seen += names
        memory = stage_memory(model, parallel, workload(width=2), stage)
        for rank in (0, tensor - 1):
            slices = [local_slices(name, shapes[name], rank, tensor) for name in names]
            count = sum(math.prod(part.stop - part.start for part in parts) for parts in slices)
            assert memory.parameters == count
            assert memory.weights == 2 * count
            # The head's gradient is float32, so a tied embedding's is as well.
            ends = "word_embeddings" if model.tie_word_embeddings else "lm_head"
            wide = sum(math.prod(part.stop - part.start for part in parts) for name, parts in zip(names, slices) if ends in name)
            norm = model.hidden_size if "transformer.ln_f.weight" in names else 0
            assert memory.gradients == 2 * (count + wide + norm)
            assert memory.optimizer == 12 * count  # two moments and a master weight of 4 bytes
    twice = {"transformer.word_embeddings.weight"} if model.tie_word_embeddings and pipeline > 1 else set()
    assert sorted(seen) == sorted([*shapes, *twice])


def test_parameters_equal_the_published_size(shared):
    """12B's index states the bytes of its bfloat16 weights."""
    model = TeleChatConfig.from_pretrained(shared / "data" / "telechat_12b.config.json")
    assert stage_memory(model, mesh(), workload(width=2), 0).weights == 24_772_864_000


@pytest.mark.parametrize("model", [SMALL, TIED])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shard", [False, True])
def test_weights_and_optimizer_equal_the_tensors_of_a_stage(monkeypatch, model, dtype, shard):
    """Tensor 2, so that 101 tokens are filled up to 102 rows; data 4, which divides some tensors' rows."""
    from telechat.parallel import stage as stages
    from telechat.parallel.mesh import Mesh
    from telechat.training.optimizer import AdamW

    monkeypatch.setattr(stages, "put_collectives", lambda *arguments: None)  # no process group here
    parallel = mesh(tensor=2, pipeline=2, data=4, shard_optimizer=shard)
    width = 4 if dtype == "float32" else 2
    for rank in (0, 1, 8, 15):
        place = Mesh.place(rank, 2, 4, 2)
        stage = stages.build_stage(model, dtype, place, parallel, stages.read_random(model, 0))
        number = place.pipeline.rank
        memory = stage_memory(model, parallel, workload(width=width), number)
        assert memory.weights == sum(parameter.nbytes for parameter in stage.parameters.values())
        optimizer = AdamW(stage, TrainConfig(dtype=dtype), place.data, shard)
        groups = zip(optimizer.groups, optimizer.masters, optimizer.first, optimizer.second)
        held = sum(first.nbytes + second.nbytes + (0 if dtype == "float32" and not optimizer.is_cut(parameter)
                                                   else master.nbytes)
                   for group in groups for parameter, master, first, second in zip(*group))
        assert memory.optimizer == held


def tensor_bytes(kept):
    """Of a tensor, or of nested tuples and lists of them; what is computed again is None."""
    if kept is None:
        return 0
    return sum(map(tensor_bytes, kept)) if isinstance(kept, (tuple, list)) else kept.nbytes


@pytest.mark.parametrize("model", [SMALL, dataclasses.replace(SMALL, position_embedding="alibi")])
@pytest.mark.parametrize("recompute, length, kernels", [(False, 16, "portable"), (True, 16, None), (False, 33, None),
                                                        (False, 1040, "portable")])
def test_activations_equal_the_tensors_that_a_forward_pass_keeps(model, recompute, length, kernels):
    from telechat import TeleChat
    from telechat.parallel.mesh import Mesh
    from telechat.parallel.stage import Stage
    from telechat.training.memory import workload_of
    from telechat.training.run_config import RunConfig
    from telechat.training.step import StageCompute

    parallel = mesh(recompute=recompute)
    compute = StageCompute(Stage.of_model(TeleChat(model, kernels=kernels)), Mesh.single(), parallel)
    compute.forward("part", np.full((2, length), 5, np.int32))
    part = compute._parts["part"]
    kept = tensor_bytes(part.kept) + part.output.nbytes
    run = RunConfig.from_dict({"sequence_length": length, "batch_size": 2, "kernels": kernels})
    assert activation_bytes(model, parallel, workload_of(model, run, length, on_cpu=True), 0) == kept


@pytest.mark.parametrize("length, dropout, dtype", [(1024, 0.0, "float32"), (1025, 0.0, "float32"),
                                                    (1025, 0.1, "float32"), (4096, 0.0, "bfloat16")])
def test_a_long_sequence_holds_the_scores_of_one_block(length, dropout, dtype):
    """Where portable kernels on this device, a CPU, compute attention by blocks; a card is never taken to."""
    from telechat.model import as_dtype
    from telechat.nn.blockwise_attention import SCORES
    from telechat.nn.kernel_choice import choose_kernels
    from telechat.training.memory import workload_of
    from telechat.training.run_config import RunConfig

    model = dataclasses.replace(SMALL, attention_dropout=dropout)
    run = RunConfig.from_dict({"dtype": dtype, "batch_size": 3, "kernels": "portable"})
    by_blocks = choose_kernels(model, as_dtype(dtype), "portable").goes_by_blocks(length, dropout > 0)
    assert score_elements(model, mesh(), workload_of(model, run, length, on_cpu=True)) == \
        3 * 4 * (SCORES if by_blocks else length ** 2)
    assert score_elements(model, mesh(), workload_of(model, run, length)) == 3 * 4 * length ** 2


def test_activations_shrink_as_the_papers_say():
    """Tensor parallelism divides what it cuts, sequence parallelism all; 1F1B keeps one a later stage."""
    step = workload(length=8, batch=4)
    whole = activation_bytes(SMALL, mesh(), step, 0)
    half = activation_bytes(SMALL, mesh(tensor=2), step, 0)
    both = activation_bytes(SMALL, mesh(tensor=2, sequence_parallel=True), step, 0)
    assert both == whole // 2 < half < whole
    row = 4 * 8 * 32 * FLOAT32
    assert half - both == row // 2 * (2 * SMALL.n_layer + 1)  # x and second residual of each layer, output
    less = activation_bytes(SMALL, mesh(recompute=True), step, 0)
    assert less == row * (SMALL.n_layer + 1)
    stages = dict(pipeline=5, stages=[1] * 5)
    kept = [activation_bytes(SMALL, mesh(**stages), workload(length=8, batch=64, micro=16), stage)
            for stage in range(5)]
    layer = (whole - row) // SMALL.n_layer
    assert kept == [5 * layer + 16 * row, 4 * layer + 32 * row, 3 * layer + 32 * row, 2 * layer + 32 * row,
                    layer + 17 * row]  # what is sent stays to the step's end


@pytest.mark.parametrize("settings", [dict(recompute=True), dict(tensor=2), dict(pipeline=2), dict(data=2),
                                      dict(tensor=2, sequence_parallel=True)])
def test_each_kind_of_parallelism_lowers_the_peak(settings):
    step = workload(length=64, batch=8)
    peaks = []
    for parallel in (mesh(), mesh(**settings)):
        memories = [stage_memory(SMALL, parallel, step, stage) for stage in range(parallel.pipeline)]
        # HCCL's buffers are more than this model.
        peaks.append(max(memory.peak - memory.parts["hccl"] for memory in memories))
    assert peaks[1] < peaks[0]


def test_peak_holds_what_must_be_there_at_once():
    for settings in (dict(), dict(recompute=True), dict(tensor=2, sequence_parallel=True), dict(data=2)):
        memory = stage_memory(SMALL, mesh(**settings), workload(length=64), 0)
        states = memory.weights + memory.gradients + memory.optimizer
        rest = memory.activations + memory.logits + memory.held + 2 * memory.work
        tensors = memory.peak - memory.parts["hccl"] - memory.parts["pool"]
        assert states < tensors < states + rest
        assert memory.peak > memory.weights + memory.optimizer + memory.activations


def test_sharded_optimizer_divides_by_the_data_parallel_size():
    parts = stage_parts(SMALL, mesh(), 0)
    whole = optimizer_bytes(parts, mesh(data=2), 2)
    cut = optimizer_bytes(parts, mesh(data=2, shard_optimizer=True), 2)
    odd = 2 * 101 * 32 * 12  # embedding and head: 101 rows do not divide
    assert whole == 12 * parts.parameters and cut == (whole - odd) // 2 + odd


def test_index_tables_of_a_cpus_head_that_is_cut():
    """16 bytes an element of a broadcasting kernel's result, of which the head has two where ranks share it."""
    for tensor, rows, vocabulary in ((1, 64, 0), (2, 64, 51)):
        assert index_tables(SMALL, mesh(tensor=tensor), workload(on_cpu=True), 0) == 16 * 2 * rows * vocabulary


@pytest.mark.parametrize("parallel, stage, count", [(mesh(), 0, 0), (mesh(tensor=2), 0, 2), (mesh(pipeline=2), 1, 3),
                                                    (mesh(tensor=2, data=2), 0, 4), (mesh(2, 3, 2), 0, 7), (mesh(2, 3, 2), 1, 6)])
def test_hccl_groups_of_a_rank(monkeypatch, parallel, stage, count):
    """All processes once for MindSpore and once for us, tensor, data, pipeline there and back, first and last stage; equal
    ranks have one group. Each takes two buffers."""
    monkeypatch.delenv("HCCL_BUFFSIZE", raising=False)
    assert communicators(parallel, stage) == count
    assert stage_memory(SMALL, parallel, workload(), stage).parts["hccl"] == count * 400 * 2 ** 20
    monkeypatch.setenv("HCCL_BUFFSIZE", "50")
    assert stage_memory(SMALL, parallel, workload(), stage).parts["hccl"] == count * 100 * 2 ** 20


@pytest.mark.parametrize("layers, hidden, inner, vocabulary", [(12, 768, 2048, 40000), (24, 1024, 2816, 70000),
                                                               (16, 2048, 5632, 120000)])
def test_the_rule_of_the_readme_is_within_15_percent_of_the_estimate(layers, hidden, inner, vocabulary):
    """16 bytes a parameter, activations and 0.7 GB: float32 on a CPU."""
    from telechat.training.memory import workload_of
    from telechat.training.run_config import RunConfig

    model = TeleChatConfig(vocab_size=vocabulary, hidden_size=hidden, n_layer=layers, n_head=16 if hidden > 768 else 12,
                           ffn_hidden_size=inner, tie_word_embeddings=False)
    for length, batch in ((512, 1), (512, 4), (2048, 1)):
        step = workload_of(model, RunConfig.from_dict({"batch_size": batch}), length, on_cpu=True)
        memory = stage_memory(model, mesh(), step, 0)
        rule = 16 * memory.parameters + memory.activations + 0.7e9
        assert rule == pytest.approx(memory.peak, rel=0.15)


@pytest.mark.parametrize("settings", [{}, {"batch": 64}, {"batch": 64, "micro": 4}, {"length": 512}, {"width": 2}])
@pytest.mark.parametrize("parallel", [mesh(), mesh(recompute=True), mesh(pipeline=2), mesh(data=2)])
def test_the_parts_add_up_to_the_peak(parallel, settings):
    for stage in range(parallel.pipeline):
        memory = stage_memory(SMALL, parallel, workload(**settings, on_cpu=True), stage)
        assert sum(memory.parts.values()) == memory.peak and min(memory.parts.values()) >= 0
        for name in ("weights", "optimizer", "held"):
            assert memory.parts[name] == getattr(memory, name)
        assert memory.parts["gradients"] <= memory.gradients and memory.parts["activations"] <= memory.activations
