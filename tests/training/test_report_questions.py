"""Whose questions the report asks: held-out ones where there are any, else of the training data."""

import pytest

from telechat.data.conversation import read_conversations
from telechat.data.preprocess import preprocess
from telechat.data.mixture import MixtureFile, read_mixture
from telechat.data.tokenizer import Tokenizer
from telechat.training.run import TrainingRun
from telechat.training.run_config import RunConfig
from telechat.training.run_model import build_model
from telechat.training.trainer import Trainer
from tests.conftest import ROOT, save_small_model

FILE = ROOT / "samples" / "conversations.jsonl"


@pytest.mark.parametrize("share", [0.1, 0.0])
def test_questions_are_held_out_ones(tmp_path, share):
    save_small_model(tmp_path / "model")
    tokenizer = Tokenizer.from_pretrained(tmp_path / "model")
    preprocess([MixtureFile(str(FILE))], tokenizer, str(tmp_path / "data"), 160, eval_share=share)
    run = TrainingRun(RunConfig.from_dict({"train_dataset": str(tmp_path / "data"), "load_checkpoint": str(tmp_path / "model"),
                                           "output_dir": str(tmp_path / "run"), "batch_size": 2}), report=True)
    (tmp_path / "run").mkdir()
    answers = run._answers(Trainer(build_model(run), run.config.train))
    conversations = read_conversations(FILE)
    held_out = {conversations[number][0][0] for number in read_mixture([MixtureFile(str(FILE))], 2024, share).evaluation}
    asked = [tokenizer.decode(prompt, skip_control_tokens=True).strip() for prompt in answers.prompts]
    assert len(asked) == 3 and answers.held_out == bool(share)
    assert set(asked) <= held_out if share else set(asked) <= {turns[0][0] for turns in conversations}
