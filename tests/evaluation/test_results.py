"""The file of an evaluation's answers: what is taken up, cut short by a crash, or another evaluation; the letters' ids."""

import dataclasses
import types

import pytest

from telechat import InputError, Tokenizer
from telechat.content import first_difference
from telechat.data.chat_template import ChatTemplate
from telechat.data.conversation import ChatFormat
from telechat.evaluation.identity import identify
from telechat.evaluation.multiple_choice import letter_ids
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
    assert again._file.closed
    assert (tmp_path / "answers.jsonl").read_bytes() == whole + b'{"key": "a/3", "answer": "C"}\n'


@pytest.mark.parametrize("line", ['{"key": "1"}', '{"key": "1", "los": 2.5, "tokens": 3}', '{"key": "1", "loss": "2", "tokens": 3}',
                                  '{"key": ["1"], "answer": "A"}', '3'])
def test_a_line_that_is_no_answer_is_refused(tmp_path, line):
    Results(tmp_path, {}, Mesh.single().world).close()
    (tmp_path / "answers.jsonl").write_text('{"key": "0", "loss": 2.5, "tokens": 3}\n' + line + "\n")
    with pytest.raises(InputError, match="answers.jsonl, line 2: is no answer of an evaluation; give another --output_dir, or"):
        Results(tmp_path, {}, Mesh.single().world)


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


@pytest.mark.parametrize("pieces, ids, before", [
    (([5, 6, 10], [5, 6, 11], [5, 6, 12], [5, 6, 13]), [10, 11, 12, 13], [5, 6]),
    (([10], [11], [12], [13]), [10, 11, 12, 13], []),
    (([5, 10], [6, 10], [7, 10], [8, 10]), [5, 6, 7, 8], []),
    (([5, 10], [5, 11], [5, 12], [6, 13]), None, None),
    (([5], [5], [5], [5]), None, None),
])
def test_letters_are_told_apart_by_the_first_token_that_differs(pieces, ids, before):
    tokenizer = types.SimpleNamespace(path="t.model", encode=lambda letter, control_tokens: pieces["ABCD".index(letter)])
    if ids is None:
        with pytest.raises(InputError, match="t.model has no token of their own for A, B, C and D"):
            letter_ids(tokenizer)
    else:
        assert letter_ids(tokenizer) == (ids, before)
