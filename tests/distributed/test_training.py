"""Training on meshes under the real msrun: the official trace, and the weights of one process."""

import dataclasses
import json
import pathlib

import numpy as np
import pytest

from telechat import TeleChat, TrainConfig, Trainer
from telechat.checkpoint.reader import CheckpointReader

RECIPE = dict(learning_rate=1e-3, warmup_steps=2, total_steps=8, betas=[0.9, 0.95], eps=1e-8, weight_decay=0.1,
              max_grad_norm=1.0)
SIZES = ("7b", "12b", "52b")
# On CPU this is also how long a collective waits for a neighbour that still compiles.
PATIENT = {"MS_NODE_TIMEOUT": "120"}

# Name → ParallelConfig, micro-batches, and the sizes it fits: 7B's tiny model has two layers.
TWO = {
    "dp2": (dict(data=2), 1, SIZES),
    "tp2": (dict(tensor=2), 1, SIZES),
    "pp2": (dict(pipeline=2), 2, SIZES),
    "tp2 sequence parallel": (dict(tensor=2, sequence_parallel=True), 1, SIZES),
    "dp2 sharded optimizer": (dict(data=2, shard_optimizer=True), 1, SIZES),
}
THREE = {"pp3": (dict(pipeline=3), 2, ("12b", "52b"))}
FOUR = {
    "tp4": (dict(tensor=4), 1, SIZES),
    "dp2 tp2": (dict(data=2, tensor=2), 1, SIZES),
    "tp2 pp2": (dict(tensor=2, pipeline=2), 4, SIZES),
}


@dataclasses.dataclass
class Case:
    """What one process makes of a tiny checkpoint, for comparison."""

    directory: pathlib.Path
    batches: pathlib.Path
    steps: list
    weights: dict
    evaluation: float


@pytest.fixture(scope="module")
def single(shared, tmp_path_factory):
    """single(size, rows): batches, trace and final weights of one process; with 2 rows they are the golden ones."""
    from telechat.checkpoint.convert import torch_to_ms

    made = {}

    def get(size, rows):
        if (size, rows) not in made:
            folder = tmp_path_factory.mktemp(f"{size}_{rows}")
            official = shared / "reference" / f"telechat_{size}_tiny"
            torch_to_ms(str(official), str(folder / "checkpoint"))
            golden = np.load(official / "golden.npz")
            model = TeleChat.from_pretrained(folder / "checkpoint")
            if rows == 2:
                ids, labels = golden["train_input_ids"], golden["train_labels"]
            else:
                rng = np.random.default_rng(1)
                ids = rng.integers(4, model.config.vocab_size, (8, rows, 24)).astype(np.int32)
                labels = np.where(rng.random(ids.shape) < 0.6, ids, -100).astype(np.int32)
            np.savez(folder / "batches.npz", ids=ids, labels=labels)
            trainer = Trainer(model, TrainConfig(**RECIPE))
            steps = [trainer.train_step(*batch) for batch in zip(ids, labels)]
            if rows == 2:
                assert np.allclose([step.loss for step in steps], golden["train_loss"], rtol=1e-4)
                assert np.allclose([step.grad_norm for step in steps], golden["train_grad_norm"], rtol=1e-4)
            weights = {parameter.name: parameter.asnumpy().copy() for parameter in model.get_parameters()}
            made[size, rows] = Case(folder / "checkpoint", folder / "batches.npz",
                                    [[step.loss, step.grad_norm, step.learning_rate] for step in steps], weights,
                                    trainer.evaluate([(ids[0], labels[0])]))
        return made[size, rows]

    return get


def check(meshes, processes, single, msrun, tmp_path, rows=None, train=(), timeout=400):
    """Run all meshes of one process count in one job, on every size they fit, and compare."""
    cases, expected = [], []
    for name, (parallel, micro_batches, sizes) in meshes.items():
        for size in sizes:
            data = parallel.get("data", 1)
            wanted = single(size, rows or max(2, micro_batches * data))
            output = tmp_path / f"{name} {size}".replace(" ", "_")
            cases.append({"checkpoint": str(wanted.directory), "batches": str(wanted.batches), "output": str(output),
                          "train": {**RECIPE, "micro_batches": micro_batches, **dict(train)}, "parallel": parallel,
                          "evaluate": True})
            expected.append((f"{name} {size}", wanted))
    (tmp_path / "cases.json").write_text(json.dumps(cases))
    msrun(processes, "trace.py", tmp_path / "cases.json", timeout=timeout, environment=PATIENT)
    for case, (name, wanted) in zip(cases, expected):
        output = pathlib.Path(case["output"])
        reports = [json.loads((output / f"trace-8-rank-{rank}.json").read_text()) for rank in range(processes)]
        for report in reports:
            assert np.allclose(report["steps"], wanted.steps, rtol=1e-4, atol=0), name
            assert report["steps"] == reports[0]["steps"], f"{name}: every rank reports the same"
            assert report["evaluation"] == pytest.approx(wanted.evaluation, rel=1e-4), name
        reader = CheckpointReader(output / "checkpoint-000008")
        assert set(reader.names) == set(wanted.weights), name
        apart = np.concatenate([np.abs(reader.read(parameter) - weight).ravel()
                                for parameter, weight in wanted.weights.items()])
        # Adam divides a gradient by its own size: where that is nothing but rounding, a weight may move by
        # a fraction of the learning rate either way. One weight in ten thousand is allowed to.
        assert np.mean(apart > 1e-5) <= 1e-4 and apart.max() < 2e-4, (name, apart.max())


def some(meshes, **sizes):
    """The meshes with the sizes chosen for each, by the name without blanks."""
    return {name: (parallel, micro_batches, sizes[name.replace(" ", "_")])
            for name, (parallel, micro_batches, _) in meshes.items()}


def test_two_processes(single, msrun, tmp_path):
    check(TWO, 2, single, msrun, tmp_path)


def test_three_stages(single, msrun, tmp_path):
    check(some(THREE, pp3=("12b",)), 3, single, msrun, tmp_path)


def test_four_processes(single, msrun, tmp_path):
    check(some(FOUR, tp4=("52b",), dp2_tp2=("7b",), tp2_pp2=("12b",)), 4, single, msrun, tmp_path)


@pytest.mark.wide
def test_three_stages_of_every_size(single, msrun, tmp_path):
    check(THREE, 3, single, msrun, tmp_path, timeout=900)


@pytest.mark.wide
def test_four_processes_of_every_size(single, msrun, tmp_path):
    check(FOUR, 4, single, msrun, tmp_path, timeout=1800)
