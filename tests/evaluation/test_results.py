"""The file of an evaluation's answers: what is taken up, what a crash cut short, and what is another evaluation."""

import dataclasses

from telechat import Tokenizer
from telechat.content import first_difference
from telechat.data.chat_template import ChatTemplate
from telechat.data.conversation import ChatFormat
from telechat.evaluation.identity import identify
from telechat.evaluation.run import Results
from telechat.generation.settings import GenerationSettings
from telechat.parallel.mesh import Mesh
from tests.conftest import ROOT
from tests.test_model import small_config


def test_what_a_crash_cut_short_is_dropped_and_all_else_kept(tmp_path):
    identity, world = {"task": "ceval"}, Mesh.single().world
    results = Results(tmp_path, identity, world)
    results.add("a/1", answer="B")
    results.add("a/2", answer="汉")
    results.close()
    whole = (tmp_path / "answers.jsonl").read_bytes()
    (tmp_path / "answers.jsonl").write_bytes(whole + '{"key": "a/3", "answer": "汉'.encode()[:-1])
    again = Results(tmp_path, identity, world)
    assert list(again.records) == ["a/1", "a/2"] and (tmp_path / "answers.jsonl").read_bytes() == whole
    again.add("a/3", answer="C")
    again.close()
    assert (tmp_path / "answers.jsonl").read_bytes() == whole + b'{"key": "a/3", "answer": "C"}\n'


def test_another_chat_template_is_another_evaluation(tmp_path):
    tokenizer = Tokenizer.from_pretrained(ROOT / "samples" / "tokenizer.model")
    template = ChatTemplate(5, {"<tool_call>": 6, "</tool_call>": 7, "<tool_response>": 8, "</tool_response>": 9},
                            default_system="你好")
    given = []
    for template in (template, template, dataclasses.replace(template, default_system="您好"), None):
        chat_format = dataclasses.replace(ChatFormat.for_tokenizer(tokenizer), template=template)
        settings = GenerationSettings(tokenizer, chat_format, {}, 32, ())
        given.append(identify(tmp_path, small_config(), settings, {}, task="jsonl"))
    assert given[0] == given[1]
    assert first_difference("", given[0], given[2]) == (".chat_template.default_system", "你好", "您好")
    assert given[3]["chat_template"] is None
