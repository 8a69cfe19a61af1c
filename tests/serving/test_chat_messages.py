"""Messages, tools and thoughts of a chat request: what is read, and what is refused with which status and field."""

import pytest

from telechat.data.chat_template import ChatTemplate
from telechat.serving.api_error import APIError
from telechat.serving.chat_messages import plain_messages, read_offer, read_thinking, template_messages

TOOL = {"type": "function", "function": {"name": "add"}}
CALL = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "add", "arguments": "{}"}}]}
THINKS, PLAIN = ChatTemplate(5, {}, think=10, end_of_thought=9), ChatTemplate(5, {})


def message(role, content="x"):
    return {"role": role, "content": content}


def refused(function, *given):
    with pytest.raises(APIError) as error:
        function(*given)
    return error.value.status, error.value.param, error.value.message


def test_turns_system_texts_and_parts_are_read():
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    body = {"messages": [message("system", "s"), message("developer", "t"), message("user", "q"), message("assistant", "a"),
                         message("user", parts)]}
    assert plain_messages(body, "prepend") == ([{"role": "user", "content": "s\nt\nq"}, {"role": "bot", "content": "a"}], "ab")
    assert plain_messages({"messages": [message("user")]}, "refuse") == ([], "x")


@pytest.mark.parametrize("content", [None, 3, [], ["a"], [{"type": "image_url", "text": "a"}], [{"type": "text", "text": 3}],
                                     [{"text": "a"}], [{"type": "text", "text": "a"}, {"type": "text"}]])
def test_a_content_that_is_no_text(content):
    assert refused(plain_messages, {"messages": [message("user"), message("assistant"), message("user", content)]}, "refuse") \
        == (400, "messages[2]", 'messages[2].content must be a text, or a list of {"type": "text", "text": …}')


def test_a_system_text_behind_a_question_is_refused():
    assert refused(plain_messages, {"messages": [message("user"), message("system"), message("user")]}, "prepend") == (
        400, "messages[1]", "messages[1]: system messages must come first")


def test_what_a_template_reads():
    asked = [message("system", "s"), message("user", "q")]
    assert template_messages({"messages": asked}) == ([message("system", "s")], "q")
    history, question = template_messages({"messages": [*asked, CALL, message("tool", "3")]})
    assert question is None and history == [*asked, {"role": "bot", "content": "", "tool_calls": [
        {"name": "add", "arguments": {}}]}, message("tool", "3")]


@pytest.mark.parametrize("messages, param, said", [
    (None, "messages", "messages must be a list with at least one message"),
    ([], "messages", "messages must be a list with at least one message"),
    ("hi", "messages", "messages must be a list with at least one message"),
    ([message("user"), message("critic")], "messages[1]",
     'messages[1].role must be "system", "user", "assistant" or "tool", not "critic"'),
    (["hi"], "messages[0]", "messages[0] must be an object, not a string"),
    ([message("user", 3)], "messages[0]", 'messages[0]: "content" must be a string, not a number'),
    ([message("user"), message("system"), message("user")], "messages",
     "messages: has a system text behind a question; it must come first"),
    ([message("user"), message("assistant")], "messages", "the last of messages must be the user's or a tool's"),
    ([message("system")], "messages", "the last of messages must be the user's or a tool's"),
])
def test_what_a_template_refuses(messages, param, said):
    assert refused(template_messages, {"messages": messages}) == (400, param, said)


def test_tools_are_offered_unless_they_are_switched_off():
    assert read_offer({}) is None and read_offer({"tools": [TOOL], "tool_choice": "none"}) is None
    assert read_offer({"tools": [TOOL]}) == read_offer({"tools": [TOOL], "tool_choice": "auto"}) == [TOOL]
    assert refused(read_offer, {"tools": [TOOL], "tool_choice": "required"}) == (
        400, "tool_choice", 'tool_choice must be "auto" or "none", not "required"')
    for wrong in ([{"type": "tool", "function": {"name": "add"}}], [{"type": "function"}], ["add"]):
        assert refused(read_offer, {"tools": wrong}) == (
            400, "tools", 'tools[0] must be {"type": "function", "function": {"name": …, "parameters": …}}')


def test_thoughts_are_as_the_model_has_them_unless_they_are_switched_off():
    def body(**arguments):
        return {"chat_template_kwargs": arguments}
    assert [read_thinking({}, template) for template in (THINKS, PLAIN, None)] == [True, False, False]
    assert read_thinking(body(), THINKS) and read_thinking(body(enable_thinking=True), THINKS)
    assert not read_thinking(body(enable_thinking=False), THINKS) and not read_thinking(body(enable_thinking=False), PLAIN)
    assert not read_thinking(body(anything=1), None), "TeleChat-1 has no template to give arguments to"
    assert refused(read_thinking, body(enable_thinking=True), PLAIN) == (
        400, "chat_template_kwargs", "enable_thinking is true, and this model does not think; leave it out")
    for wrong in ([], "yes", {"thinking": True}, {"enable_thinking": 1}, {"enable_thinking": True, "other": 1}):
        assert refused(read_thinking, {"chat_template_kwargs": wrong}, THINKS) == (
            400, "chat_template_kwargs", 'chat_template_kwargs must be {"enable_thinking": true or false}')
