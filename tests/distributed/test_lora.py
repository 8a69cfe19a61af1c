"""Adapters on meshes under the real msrun: the trace, the evaluation and the PEFT directory of one process."""

import json
import pathlib

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from telechat import TeleChat, TrainConfig, Trainer
from telechat.adapters.lora_config import LoraConfig
from telechat.adapters.trained import TrainedAdapter, read_initial
from telechat.checkpoint.convert import torch_to_ms
from telechat.quantization.quantise import quantise
from telechat.training.training_state import restore, save_training_checkpoint
from tests.conftest import ROOT, save_small_model
from tests.distributed.train_job import DEADLINE, TRAIN, refused
from tests.distributed.test_training import EVERYTHING, PATIENT, RECIPE

STEPS = 4
LORA = {"rank": 4, "alpha": 8, "dropout": 0.1}
# Mesh, micro-batches, model.
TWO = [
    (dict(tensor=2), 1, "telechat_52b"),
    (dict(tensor=2, sequence_parallel=True), 1, "telechat3"),
    (dict(pipeline=2, recompute=True), 2, "telechat_7b"),
    (dict(data=2, shard_optimizer=True), 1, "telechat_12b"),
    (dict(tensor=2), 1, "gptq_12b_4bit"),  # QLoRA: each process has its part of the quantised products
]
FOUR = [(dict(tensor=2, pipeline=2), 2, "telechat_12b"), (dict(data=2, tensor=2, shard_optimizer=True), 1, "telechat3"),
        (dict(tensor=4, sequence_parallel=True), 1, "telechat_52b")]
ACT_ORDER = ", act-order"
UNCUT = [(dict(pipeline=2), 1, f"gptq_12b_4bit{ACT_ORDER}"), (dict(data=2), 1, f"gptq_12b_4bit{ACT_ORDER}")]
EIGHT = [(EVERYTHING, 2, "telechat_7b"), (EVERYTHING, 2, "telechat2")]


def shuffle_groups(checkpoint):
    """Make a directory of quantised products one with act-order: any inputs may belong to a group."""
    random, weights = np.random.default_rng(4), load_file(checkpoint / "model.safetensors")
    save_file({name: random.permutation(array) if name.endswith(".g_idx") else array for name, array in weights.items()},
              checkpoint / "model.safetensors")
    config = json.loads((checkpoint / "config.json").read_text())
    config["quantization_config"]["desc_act"] = True
    (checkpoint / "config.json").write_text(json.dumps(config))


def trainer_of(checkpoint, train, lora):
    model = TeleChat.from_pretrained(checkpoint)
    return Trainer(model, train, adapter=TrainedAdapter(model.config, lora, range(model.config.n_layer),
                                                        read_initial(model.config, lora, train.seed)))


@pytest.fixture(scope="module")
def check(shared, tmp_path_factory):
    """check(processes, meshes, msrun, tmp_path): all in one job, each against one process."""

    def run(processes, meshes, msrun, tmp_path):
        train, cases, trainers = TrainConfig(**RECIPE, seed=3), [], []
        for number, (parallel, micro_batches, model) in enumerate(meshes):
            folder = tmp_path / str(number)
            torch_to_ms(shared / "reference" / f"{model.removesuffix(ACT_ORDER)}_tiny", folder / "checkpoint")
            if model.endswith(ACT_ORDER):
                shuffle_groups(folder / "checkpoint")
            random = np.random.default_rng(2)
            ids = random.integers(4, 90, (STEPS, 2 * micro_batches, 25)).astype(np.int32)
            labels = np.where(random.random(ids.shape) < 0.6, ids, -100).astype(np.int32)
            np.savez(folder / "batches.npz", ids=ids, labels=labels)
            cases.append({"checkpoint": str(folder / "checkpoint"), "batches": str(folder / "batches.npz"),
                          "output": str(folder / "run"), "train": {**RECIPE, "seed": 3, "micro_batches": micro_batches},
                          "parallel": parallel, "lora": LORA, "evaluate": True})
            trainers.append((trainer_of(folder / "checkpoint", train, LoraConfig(**LORA)), ids, labels))
        (tmp_path / "cases.json").write_text(json.dumps(cases))
        msrun(processes, "trace.py", tmp_path / "cases.json", timeout=900, environment=PATIENT)
        for case, (trainer, ids, labels) in zip(cases, trainers):
            compare(case, trainer, ids, labels, processes)
        return cases

    return run


def compare(case, trainer, ids, labels, processes):
    name, output = f"{case['parallel']} {case['checkpoint']}", pathlib.Path(case["output"])
    steps = [trainer.train_step(*batch) for batch in zip(ids, labels)]
    expected = [[step.loss, step.grad_norm, step.learning_rate] for step in steps]
    evaluation = trainer.evaluate([(ids[0], labels[0])])
    for rank in range(processes):
        report = json.loads((output / f"trace-{STEPS}-rank-{rank}.json").read_text())
        assert np.allclose(report["steps"], expected, rtol=1e-4, atol=0), (name, report["steps"], expected)
        assert report["evaluation"] == pytest.approx(evaluation, rel=1e-4), name
    path = output / f"checkpoint-{STEPS:06d}"
    found = load_file(path / "adapter_model.safetensors")
    saved = save_training_checkpoint(str(output / "one"), trainer, {})
    wanted = load_file(f"{saved}/adapter_model.safetensors")
    assert json.loads((path / "adapter_config.json").read_text()) == json.loads(
        pathlib.Path(saved, "adapter_config.json").read_text())
    assert found.keys() == wanted.keys(), name
    for tensor, value in wanted.items():
        # Of a gradient near 0 rounding decides what Adam makes: a tenth of a step.
        assert np.abs(found[tensor] - value).max() < 1e-4, (name, tensor)
    # What a mesh has saved one process goes on with, to the last bit of what is there.
    restore(str(path), trainer, {})
    again = load_file(f"{save_training_checkpoint(str(output / 'again'), trainer, {})}/adapter_model.safetensors")
    assert all(np.array_equal(again[tensor], value) for tensor, value in found.items()), name
    states = [load_file(file) for file in sorted((path / "training_state").glob("*.safetensors"))]
    moments = sum(np.square(value.astype(np.float64)).sum() for state in states
                  for key, value in state.items() if key.startswith("first."))
    restored = sum(np.square(tensor.asnumpy().astype(np.float64)).sum() for key, tensor in trainer.optimizer.state().items()
                   if key.startswith("first."))
    assert restored == pytest.approx(moments, rel=1e-12), name


def test_two_processes(check, msrun, tmp_path):
    check(2, TWO, msrun, tmp_path)


@pytest.mark.wide
@pytest.mark.parametrize("processes, meshes", [(2, UNCUT), (4, FOUR), (8, EIGHT)], ids=["act-order", "4", "8"])
def test_more_processes(check, processes, meshes, msrun, tmp_path):
    check(processes, meshes, msrun, tmp_path)


@pytest.mark.wide
def test_act_order_is_not_cut(dataset, msrun, tmp_path):
    save_small_model(tmp_path / "model")
    quantise(tmp_path / "model", tmp_path / "q", 4, 16, say=lambda line: None)
    shuffle_groups(tmp_path / "q")
    job = msrun(2, TRAIN, "--train_dataset", dataset, "--load_checkpoint", tmp_path / "q", "--output_dir", tmp_path / "run",
                "--config", ROOT / "configs/lora_demo.yaml", "parallel.tensor=2", check=False, timeout=DEADLINE)
    refused(job, "act-order (desc_act), which tensor parallelism cannot cut; train with parallel.tensor 1")
    assert not (tmp_path / "run/final").exists()
