"""What a training checkpoint's directory holds after a process was killed at a bad moment."""

import os

import numpy as np
import pytest

from telechat import TeleChat, TrainConfig, Trainer
from telechat.training import training_state
from telechat.training.training_state import list_checkpoints, save_training_checkpoint
from tests.conftest import save_small_model


def test_a_checkpoint_half_deleted_is_none(tmp_path, monkeypatch):
    """Killed while it drops the oldest: what is still listed can be loaded, the next save clears the rest away."""
    save_small_model(tmp_path / "model")
    trainer = Trainer(TeleChat.from_pretrained(tmp_path / "model"), TrainConfig(total_steps=9))
    output = tmp_path / "run"

    def save(step):
        trainer.step = step
        save_training_checkpoint(str(output), trainer, {}, keep=1)

    def killed(path, ignore_errors=False):
        if not ignore_errors:  # those are for what need not be there
            os.remove(os.path.join(path, "config.json"))
            raise KeyboardInterrupt

    save(1)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(training_state.shutil, "rmtree", killed)
        save(2)
    assert [os.path.basename(path) for path in list_checkpoints(output)] == ["checkpoint-000002"]
    model = TeleChat.from_pretrained(output / "checkpoint-000002")
    assert all(np.isfinite(parameter.asnumpy()).all() for parameter in model.get_parameters())
    for name in (".checkpoint-notes", "others.partial"):
        (output / name).mkdir()
    (output / ".checkpoint-000002.partial").mkdir(exist_ok=True)
    save(3)
    assert sorted(os.listdir(output)) == [".checkpoint-notes", "checkpoint-000003", "others.partial"], "what is not ours stays"
