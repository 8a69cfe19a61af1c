"""The shipped samples: enough conversations, and the vocabulary is what the script makes of them."""

import json
import subprocess
import sys

from telechat import Tokenizer
from telechat.data.conversation import read_conversations
from tests.conftest import ROOT

SAMPLES = ROOT / "samples"


def test_conversations():
    conversations = list(read_conversations(str(SAMPLES / "conversations.jsonl")))
    assert len(conversations) >= 60
    assert sum(len(turns) > 1 for turns in conversations) >= 10
    chinese = sum(any("一" <= character <= "鿿" for character in turns[0][0]) for turns in conversations)
    assert 20 <= chinese <= len(conversations) - 20
    questions = [turns[0][0] for turns in conversations]
    asked = [json.loads(line)["input"] for line in (SAMPLES / "questions.jsonl").read_text(encoding="utf-8").splitlines()]
    assert asked[0] == "生抽与老抽的区别？" and len(asked) == 3
    assert set(asked) <= set(questions), "the demo asks what it was taught"


def test_vocabulary_is_reproducible(tmp_path):
    output = tmp_path / "tokenizer.model"
    subprocess.run([sys.executable, str(SAMPLES / "make_tokenizer.py"), "--output", str(output)],
                   check=True, capture_output=True)
    assert output.read_bytes() == (SAMPLES / "tokenizer.model").read_bytes()


def test_control_tokens_are_where_the_12b_has_them(shared):
    ours = Tokenizer.from_pretrained(SAMPLES / "tokenizer.model")
    published = Tokenizer.from_pretrained(shared / "data" / "telechat_12b.tokenizer.model")
    assert [ours.id_to_token(index) for index in range(23)] == [published.id_to_token(index) for index in range(23)]
