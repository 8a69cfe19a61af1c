"""Training state that one mesh saved goes on: bit for bit on the same mesh, within rounding on any other."""

import json
import pathlib

import numpy as np
from safetensors.numpy import load_file

from telechat import TeleChat, TrainConfig, Trainer
from telechat.training.training_state import list_checkpoints, restore
from tests.distributed.test_training import PATIENT, RECIPE, single  # noqa: F401


def test_resume_on_the_same_and_on_other_meshes(single, msrun, tmp_path):  # noqa: F811
    wanted = single("telechat_12b", 2)

    def case(output, parallel, stop_after, **more):
        return {"checkpoint": str(wanted.directory), "batches": str(wanted.batches), "output": str(tmp_path / output),
                "train": RECIPE, "parallel": parallel, "stop_after": stop_after, **more}

    tensor = {"tensor": 2}
    sharded = {"data": 2, "shard_optimizer": True}
    lost = [case(f"lost in {dtype}", mesh, 8, lost=True, train={**RECIPE, "dtype": dtype})
            for dtype, mesh in (("float32", tensor), ("bfloat16", sharded), ("float16", tensor))]
    cases = [case("whole", tensor, 8), case("broken", tensor, 3), case("broken", tensor, 8, resume=True),
             case("moved", tensor, 3), case("moved", {"pipeline": 2}, 5, resume=True),
             case("moved", sharded, 6, resume=True), case("moved", tensor, 8, resume=True, lost=True), *lost]
    (tmp_path / "cases.json").write_text(json.dumps(cases))
    msrun(2, "trace.py", tmp_path / "cases.json", timeout=400, environment=PATIENT)

    def steps(output, last):
        return json.loads((tmp_path / output / f"trace-{last}-rank-0.json").read_text())["steps"]

    # Updates that do not arrive stop every rank, also after a resume.
    for faulty in cases[-4:]:
        said = [json.loads((pathlib.Path(faulty["output"]) / f"lost-rank-{rank}.json").read_text()) for rank in (0, 1)]
        first = 7 if faulty.get("resume") else 1
        assert all(f"update {first} of transformer.word_embeddings.weight did not arrive" in text for text in said), said

    whole, broken = tmp_path / "whole" / "checkpoint-000008", tmp_path / "broken" / "checkpoint-000008"
    assert steps("broken", 3) + steps("broken", 8) == steps("whole", 8)
    for path in sorted(whole.rglob("*.safetensors")):
        expected, actual = load_file(path), load_file(broken / path.relative_to(whole))
        assert expected.keys() == actual.keys()
        assert all(np.array_equal(expected[name], actual[name]) for name in expected), path.name

    # The last two steps in one process, from what the sharded optimizer left.
    trainer = Trainer(TeleChat.from_pretrained(wanted.directory), TrainConfig(**RECIPE))
    restore(list_checkpoints(str(tmp_path / "moved"))[-1], trainer, {})
    batches = np.load(wanted.batches)
    results = [trainer.train_step(batches["ids"][step], batches["labels"][step]) for step in (6, 7)]
    trace = steps("moved", 3) + steps("moved", 5) + steps("moved", 6) \
        + [[result.loss, result.grad_norm, result.learning_rate] for result in results]
    assert np.allclose(trace, wanted.steps, rtol=1e-4, atol=0)
    assert pathlib.Path(list_checkpoints(str(tmp_path / "moved"))[-1]).name == "checkpoint-000006"
