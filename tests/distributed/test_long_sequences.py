"""Training with attention by blocks, the tensors and the sequence cut over two processes, under the real msrun."""

import json

import numpy as np
import pytest

from telechat import TeleChat, TrainConfig, Trainer
from telechat.nn import blockwise_attention
from tests.test_model import small_config

RECIPE = dict(learning_rate=1e-3, kernels="portable")
PARALLEL = dict(tensor=2, sequence_parallel=True)
LENGTH = blockwise_attention.LONGEST_WHOLE + 17  # the last is predicted only; the others go by blocks, the last a short one


def test_a_step_over_two_processes_is_that_of_one(msrun, tmp_path, monkeypatch):
    """The one process makes all scores at once."""
    model = TeleChat(small_config(num_key_value_heads=2, initializer_range=0.2), seed=1)
    model.save_pretrained(tmp_path / "checkpoint")
    random = np.random.default_rng(0)
    ids = random.integers(4, 96, (1, 1, LENGTH)).astype(np.int32)
    labels = np.where(random.random(ids.shape) < 0.5, ids, -100).astype(np.int32)
    np.savez(tmp_path / "batches.npz", ids=ids, labels=labels)
    case = dict(checkpoint=str(tmp_path / "checkpoint"), batches=str(tmp_path / "batches.npz"), train=RECIPE,
                parallel=PARALLEL, evaluate=True, output=str(tmp_path / "output"))
    (tmp_path / "cases.json").write_text(json.dumps([case]))
    msrun(2, "trace.py", tmp_path / "cases.json", environment={"MS_NODE_TIMEOUT": "120"})
    monkeypatch.setattr(blockwise_attention, "LONGEST_WHOLE", LENGTH)
    trainer = Trainer(model, TrainConfig(**RECIPE))
    step = trainer.train_step(ids[0], labels[0])
    evaluation = trainer.evaluate([(ids[0], labels[0])])
    for rank in range(2):
        report = json.loads((tmp_path / "output" / f"trace-1-rank-{rank}.json").read_text())
        assert report["steps"][0][:2] == pytest.approx([step.loss, step.grad_norm], rel=1e-4)
        assert report["evaluation"] == pytest.approx(evaluation, rel=1e-4)
