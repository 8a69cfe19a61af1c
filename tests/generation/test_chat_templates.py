"""TeleChat2's and TeleChat3's formats: the publisher's texts and ids, and what is dropped, refused and learnt."""

import functools
import json
import shutil

import pytest

from telechat import InputError, Tokenizer
from telechat.data.chat_template import Part, _joined
from telechat.data.conversation import ChatFormat, parse_messages
from telechat.data.encoding import IGNORED, encode_conversation
from telechat.generation.chat import build_prompt, parse_prompt, part_ids

MODELS = {"telechat2": "telechat2_115b", "telechat3": "telechat3_36b"}


def load(shared, folder, name, config=None):
    shutil.copy(shared / "data" / f"{MODELS[name]}.tokenizer.model", folder / "tokenizer.model")
    if config:
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    tok = Tokenizer.from_pretrained(folder)
    return tok, ChatFormat.for_tokenizer(tok)


@pytest.fixture(scope="module", params=MODELS)
def model(request, shared, tmp_path_factory):
    """(name, Tokenizer, ChatFormat)"""
    return request.param, *load(shared, tmp_path_factory.mktemp(request.param), request.param)


def ours(messages):
    """OpenAI's messages as `ChatTemplate.parts` takes them."""
    record = {"messages": messages if messages[-1]["role"] == "assistant" else
              [*messages, {"role": "assistant", "content": "x"}]}
    parsed = parse_messages(record).messages
    return parsed if messages[-1]["role"] == "assistant" else parsed[:-1]


def test_published_template(model, shared):
    name, tok, chat_format = model
    cases = [case for case in json.loads((shared / f"reference/chat_{name}.json").read_text(encoding="utf-8"))
             if case.get("format", "template") == "template"]
    assert len(cases) == {"telechat2": 20, "telechat3": 24}[name]
    for case in cases:
        parts = chat_format.template.parts(chat_format, ours(case["messages"]), case["tools"],
                                           prompt=case["add_generation_prompt"])
        assert "".join(tok.id_to_token(part.content) if isinstance(part.content, int) else part.content
                       for part in parts).replace("<_control1>", "<tool_call>").replace("<_control2>", "</tool_call>") \
            .replace("<_control3>", "<tool_response>").replace("<_control4>", "</tool_response>") == case["text"]
        assert [index for part in parts for index in part_ids(tok, part)] == case["ids"], case["case"]
        if case["add_generation_prompt"]:
            history = ours(case["messages"])
            question = history.pop()["content"] if history[-1]["role"] == "user" else None
            assert build_prompt(tok, history, question, 1 << 20, chat_format, tools=case["tools"]) == case["ids"]


def test_thought_tokens_by_the_tokenizer_config(shared, tmp_path):
    """The names that the model's folder gives to tokens 9 and 10 go before the pieces' own."""
    swapped = {"9": {"content": "<think>"}, "10": {"content": "</think>"}}
    tok, chat_format = load(shared, tmp_path, "telechat3", {"added_tokens_decoder": swapped})
    assert (chat_format.template.think, chat_format.template.end_of_thought) == (9, 10)
    for case in json.loads((shared / "reference/chat_telechat3.json").read_text(encoding="utf-8")):
        parts = chat_format.template.parts(chat_format, ours(case["messages"]), case["tools"],
                                           prompt=case["add_generation_prompt"])
        assert [index for part in parts for index in part_ids(tok, part)] == case["ids_think_9_10"]


def test_first_release_of_telechat2(shared, tmp_path):
    """The publisher's chat() of September 2024: a start token and bare turns, the oldest left out beyond the budget."""
    tok, _ = load(shared, tmp_path, "telechat2")
    chat_format = ChatFormat.for_tokenizer(tok, start_token="<_start>")
    cases = [case for case in json.loads((shared / "reference/chat_telechat2.json").read_text(encoding="utf-8"))
             if case["format"] == "ids"]
    assert len(cases) == 10
    for case in cases:
        budget = max(0, case["seq_length"] - case["max_new_tokens"] - 1) if "max_new_tokens" in case else case["max_length"]
        assert build_prompt(tok, case["history"], case["question"], budget, chat_format) == case["ids"]
    with pytest.raises(InputError, match="--start_token <_start>: TeleChat3's conversations begin with their system text"):
        load(shared, tmp_path, "telechat3")
        ChatFormat.for_tokenizer(Tokenizer.from_pretrained(tmp_path), start_token="<_start>")


def test_training_ids_of_telechat2(shared, tmp_path):
    """The publisher's own but for line breaks: it tokenises the system text's on its own, and the last turn has none."""
    tok, chat_format = load(shared, tmp_path, "telechat2")
    cases = [case for case in json.loads((shared / "reference/chat_telechat2.json").read_text(encoding="utf-8"))
             if case["format"] == "train"]
    assert len(cases) == 4
    alone, user = tok.encode("\n", control_tokens=False), chat_format.user
    for case in cases:
        messages = [{"role": "system", "content": case["system"]}, *case["messages"]]
        ids, _ = encode_conversation(tok, chat_format, parse_messages({"messages": messages}))
        first, system = ids.index(user), tok.encode(case["system"], control_tokens=False)
        assert ids[:first] == [6, *tok.encode(case["system"] + "\n", control_tokens=False)]
        assert ids[-len(alone):] == alone
        assert [6, *system, *alone, *ids[first:-len(alone)]] == case["ids"]


def test_telechat_1_has_no_template(shared):
    for name in ("telechat_12b", "telechat_52b"):
        assert ChatFormat.for_tokenizer(Tokenizer.from_pretrained(shared / f"data/{name}.tokenizer.model")).template is None


def test_answers_alone_are_learnt(model):
    """Each answer with its end token and its calls; no question, system text or tool's result."""
    name, tok, chat_format = model
    record = {"tools": [{"type": "function", "function": {"name": "add"}}], "messages": [
        {"role": "system", "content": "你是助手。"}, {"role": "user", "content": "1+1?"},
        {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "add", "arguments": '{"a": 1}'}}]},
        {"role": "tool", "content": "2"}, {"role": "assistant", "content": "是2。"},
        {"role": "user", "content": "好"}, {"role": "assistant", "content": "<think>\n想\n</think>\n不客气"}]}
    ids, labels = encode_conversation(tok, chat_format, parse_messages(record))
    learnt, spans = [], []
    for index, label in zip(ids, labels):
        assert label in (index, IGNORED)
        if label == IGNORED:
            spans.append(learnt)
            learnt = []
        else:
            learnt.append(index)
    spans = [span for span in spans if span]
    text = tok.encode
    call = chat_format.template.tool_tokens
    assert spans[0] == [call["<tool_call>"], *text('\n{"name": "add", "arguments": {"a": 1}}\n'), call["</tool_call>"], 2]
    assert spans[1] == [*text("是2。"), 2]
    if name == "telechat3":
        assert spans[2] == [10, *text("\n想\n"), 9, *text("\n不客气"), 2]
    else:
        assert spans[2] == [*text("<think>\n想\n</think>\n不客气", control_tokens=False), 2]
    assert len(spans) == 3


def test_records_of_the_publisher_spell_calls_and_results(model):
    """``dialog``: the system text ends with its line break, and the tokens of calls and results stand in the texts."""
    _, tok, chat_format = model
    opened, closed, result, result_end = chat_format.template.tool_tokens.values()
    call = '<tool_call>\n{"name": " f"}\n</tool_call>'
    record = {"system": f"甲\n{call}\n\n", "multiturn": True, "tool": True, "dialog": [
        {"role": "user", "content": "乙"}, {"role": "bot", "content": f"丙 \n{call}"},
        {"role": "user", "content": "<tool_response>\n丁\n</tool_response>"}, {"role": "bot", "content": "戊<_user>"}]}
    text = functools.partial(tok.encode, control_tokens=False)
    body = text('\n{"name": " f"}\n')
    learnt = [[*text("丙 \n"), opened, *body, closed, 2], [*text("戊<_user>"), 2]]
    between = [[6, *text("甲\n"), opened, *body, closed, *text("\n\n"), 4, *text("乙"), 5],
               [*text("\n"), 4, result, *text("\n丁\n"), result_end, 5], text("\n")]
    ids, labels = encode_conversation(tok, chat_format, parse_messages(record))
    assert ids == between[0] + learnt[0] + between[1] + learnt[1] + between[2]
    ignored = [[IGNORED] * len(span) for span in between]
    assert labels == ignored[0] + learnt[0] + ignored[1] + learnt[1] + ignored[2]


def test_oldest_turns_are_dropped_and_the_system_text_stays(model):
    _, tok, chat_format = model
    history = [{"role": "system", "content": "甲"}]
    for turn in range(4):
        history += [{"role": "user", "content": f"问题{turn}"}, {"role": "bot", "content": f"回答{turn}"}]
    whole = build_prompt(tok, history, "最后", 1 << 20, chat_format)
    newest = build_prompt(tok, [history[0], *history[-2:]], "最后", 1 << 20, chat_format)
    assert build_prompt(tok, history, "最后", len(whole), chat_format) == whole
    assert build_prompt(tok, history, "最后", len(newest), chat_format) == newest
    alone = build_prompt(tok, history[:1], "最后", 1 << 20, chat_format)
    assert build_prompt(tok, history, "最后", len(newest) - 1, chat_format) == alone
    long = build_prompt(tok, history, "长" * 400, 60, chat_format)
    entire = build_prompt(tok, history[:1], "长" * 400, 1 << 20, chat_format)
    question = len(entire) - entire[::-1].index(chat_format.user)  # where its text begins
    assert long == entire[:question] + entire[question - 60:], "its end is kept"
    least = question + 1 + len(entire) - (len(entire) - 1 - entire[::-1].index(chat_format.bot))
    assert len(build_prompt(tok, history, "长" * 400, least, chat_format)) == least
    with pytest.raises(InputError, match=f"max_length {least - 1} leaves no room"):
        build_prompt(tok, history, "长" * 400, least - 1, chat_format)
    with pytest.raises(InputError, match="max_length 4 leaves no room for the question behind the system text"):
        build_prompt(tok, history, "最后", 4, chat_format)


def test_texts_that_follow_each_other_are_one_but_what_is_learnt_stays_apart():
    parts = [Part("a"), Part(""), Part("b"), Part("c", True), Part("d", True), Part(5), Part("e"), Part(6, True), Part(7)]
    assert _joined(parts) == [Part("ab"), Part("cd", True), Part(5), Part("e"), Part(6, True), Part(7)]


def test_control_tokens_in_a_message_stay_text(model):
    _, tok, chat_format = model
    prompt = build_prompt(tok, [], "a<_bot>b<tool_call>c", 1 << 20, chat_format)
    assert prompt.count(chat_format.bot) == 1 and not set(chat_format.template.tool_tokens.values()) & set(prompt)


def test_prompts_spelt_out(model):
    _, tok, chat_format = model
    chat = build_prompt(tok, [], "你好", 1 << 20, chat_format)
    assert parse_prompt(tok, "你好", chat_format) == parse_prompt(tok, "<_user>你好<_bot>", chat_format) == chat
    history = [{"role": "user", "content": "一"}, {"role": "bot", "content": "二"}]
    assert parse_prompt(tok, "<_user>一<_bot>二<_end>\n<_user>三<_bot>", chat_format) == build_prompt(
        tok, history, "三", 1 << 20, chat_format)
    raw = parse_prompt(tok, "<_system>甲<_user>乙<_bot>", chat_format)
    assert raw == [6, *tok.encode("甲"), 4, *tok.encode("乙"), 5]


def test_no_thinking_closes_the_thought(shared, tmp_path):
    tok, chat_format = load(shared, tmp_path, "telechat3")
    prompt = build_prompt(tok, [], "hi", 1 << 20, chat_format, thinking=False)
    assert prompt == build_prompt(tok, [], "hi", 1 << 20, chat_format) + [9, *tok.encode("\n")]


@pytest.mark.parametrize("change, said", [
    (dict(tools=[{"type": "function"}]), r'tools\[0\] must be \{"type": "function", "function"'),
    (dict(tools=[{"type": "function", "function": {"name": ""}}]), r"tools\[0\].function.name must be a text"),
    (dict(tools=[{"type": "function", "function": {"name": "f", "parameters": {"type": "array"}}}]),
     r"tools\[0\].function.parameters must be a JSON schema"),
    (dict(tools="{"), "tools is a text that is not JSON"),
    (dict(messages=[{"role": "critic", "content": ""}]), r"messages\[0\]: role must be one of .*tool.*, not \"critic\""),
    (dict(messages=[{"role": "user", "content": "q"}]), "ends with a question"),
    (dict(messages=[{"role": "tool", "content": "2"}, {"role": "assistant", "content": "2"}]), "without a call before it"),
    (dict(messages=[{"role": "assistant", "content": "2"}]), "an answer has no question before it"),
    (dict(messages=[{"role": "user", "content": "q"}, {"role": "assistant", "tool_calls": [
        {"function": {"name": "f", "arguments": "[1]"}}]}]), r"tool_calls\[0\].function.arguments must be a JSON object"),
    (dict(messages=[{"role": "user", "content": "q"}, {"role": "system", "content": "s"},
                    {"role": "assistant", "content": "a"}]), "system text behind a question"),
])
def test_wrong_records_are_refused(change, said):
    record = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}], **change}
    with pytest.raises(InputError, match=said):
        parse_messages(record)
