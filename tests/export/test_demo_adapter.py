"""The adapter of `make demo-lora`: every answer that it was taught, and every one that the demo model knew before."""

import contextlib
import io

import pytest

from telechat import Generator, SamplingParams, TeleChat
from telechat.config import TeleChatConfig
from telechat.data.conversation import read_conversations
from telechat.data.encoding import IGNORED, encode_conversation
from telechat.generation.settings import GenerationSettings
from tests.conftest import ROOT, load_tool

DEMO = ROOT / "demo" / "run" / "final"
SAMPLES = ROOT / "samples"


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """Trained by the commands of `make demo-lora`."""
    if not (DEMO / "config.json").exists():
        pytest.skip("needs demo/run/final, of make demo")
    folder = tmp_path_factory.mktemp("demo-lora")
    lines = (ROOT / "Makefile").read_text(encoding="utf-8").split("\ndemo-lora:")[1].split("\n\n")[0].replace("\\\n", " ").splitlines()
    for tool in ("preprocess", "train"):
        words = next(line for line in lines if f"tools/{tool}.py" in line).split()
        words = [word.replace("demo/lora", str(folder / "lora")) for word in words[2:]]
        with contextlib.chdir(ROOT), contextlib.redirect_stdout(io.StringIO()):
            assert not load_tool(tool).main(words)
    return folder / "lora/final"


@pytest.mark.parametrize("file, count", [("new_conversations.jsonl", 12), ("conversations.jsonl", 90)])
def test_answers_of_every_turn(adapter, file, count):
    """Greedy answers are what is in the file; before a conversation's second question stand its own answers."""
    settings = GenerationSettings.load(str(DEMO), TeleChatConfig.from_pretrained(DEMO))
    prompts, wanted = [], []
    for turns in read_conversations(str(SAMPLES / file)):
        ids, labels = encode_conversation(settings.tokenizer, settings.chat_format, turns)
        starts = [place for place in range(1, len(ids)) if labels[place] != IGNORED and labels[place - 1] == IGNORED]
        for start in starts:
            end = next((place for place in range(start, len(ids)) if labels[place] == IGNORED), len(ids))
            prompts.append(ids[:start])
            wanted.append(ids[start:end - 1])  # without the end token
    assert len(wanted) == count
    generator = Generator(TeleChat.from_pretrained(DEMO, lora=adapter), 512, batch_size=16)
    answers = generator.generate(prompts, SamplingParams(128, stop_ids=(settings.chat_format.end,)))
    assert [settings.tokenizer.decode(ids) for ids in answers] == [settings.tokenizer.decode(ids) for ids in wanted]
