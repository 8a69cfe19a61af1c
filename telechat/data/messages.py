"""Messages with system texts, tools and thoughts: what a record or a request of OpenAI's form says, checked and in one form.

A message is {"role": "system", "user", "bot" or "tool", "content": str}; a bot's may have "tool_calls", a list of
{"name": str, "arguments": dict}. `ChatTemplate.parts` writes them as a model wants them.
"""

import dataclasses
import json
from typing import Optional

from telechat.data.record_forms import check_fields, json_type, named_text, ROLES, text_of
from telechat.errors import InputError

_ROLES = {**ROLES, "tool": "tool", "observation": "tool", "function_call": "bot"}


@dataclasses.dataclass(frozen=True)
class Conversation:
    """Messages in order, the system's first if there is one, and the tools that the model may call.

    Attributes:
        spells_tokens: whether the tokens around calls and results stand in the texts, as in the publisher's files.
    """

    messages: list
    tools: Optional[list] = None
    spells_tokens: bool = False


def read_tools(tools, place="tools"):
    """A list of tool definitions in OpenAI's form, checked; None for an empty one.

    Args:
        tools: what JSON gave, or a text that holds it; each {"type": "function", "function": {"name": …}}, with
            "description" and "parameters" as they are.
        place (str): how messages call it.

    Raises:
        InputError: names the tool and what is wrong with it.
    """
    tools = _decoded(tools, place)
    if tools is None or tools == []:
        return None
    if not isinstance(tools, list):
        raise InputError(f"{place} must be a list of tools, not {json_type(tools)}")
    for number, tool in enumerate(tools):
        where = f"{place}[{number}]"
        function = tool.get("function") if isinstance(tool, dict) and tool.get("type") == "function" else None
        if not isinstance(function, dict):
            raise InputError(f'{where} must be {{"type": "function", "function": {{"name": …, "parameters": …}}}}')
        if not isinstance(function.get("name"), str) or not function["name"]:
            raise InputError(f"{where}.function.name must be a text that is not empty")
        if not isinstance(function.get("description", ""), str):
            raise InputError(f"{where}.function.description must be a text, not {json_type(function['description'])}")
        parameters = function.get("parameters", {})
        if not isinstance(parameters, dict) or parameters.get("type", "object") != "object" \
                or not isinstance(parameters.get("properties", {}), dict):
            raise InputError(f'{where}.function.parameters must be a JSON schema of "type": "object" with "properties"')
    return tools


def read_tool_calls(calls, place):
    """A bot's calls, OpenAI's [{"function": {"name": …, "arguments": …}}] or plain objects, as {"name", "arguments"}.

    Raises:
        InputError: names the call and what is wrong with it.
    """
    if not isinstance(calls, list):
        raise InputError(f"{place} must be a list of calls, not {json_type(calls)}")
    read = []
    for number, call in enumerate(calls):
        where = f"{place}[{number}]"
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise InputError(f'{where} must be {{"function": {{"name": …, "arguments": …}}}}')
        arguments = _decoded(function.get("arguments", {}), f"{where}.function.arguments")
        if not isinstance(arguments, dict):
            raise InputError(f"{where}.function.arguments must be a JSON object, not {json_type(arguments)}")
        read.append({"name": function["name"], "arguments": arguments})
    return read


def read_message(message, place):
    """One message of OpenAI's or ShareGPT's form.

    Raises:
        InputError: a field is missing, wrong or not known.
    """
    if not isinstance(message, dict):
        raise InputError(f"{place} must be an object, not {json_type(message)}")
    who, what = ("from", "value") if "from" in message or "value" in message else ("role", "content")
    check_fields(message, {who, what, "tool_calls", "reasoning_content", "tool_call_id", "name"}, f"{place} ")
    role = named_text(message, who, place)
    if role not in _ROLES:
        raise InputError(f"{place}: {who} must be one of {', '.join(_ROLES)}, not {json.dumps(role)[:60]}")
    calls = message.get("tool_calls")
    content = "" if calls and message.get(what) is None else text_of(message, what, place)
    if role == "function_call":  # LLaMA-Factory's: the call itself is what was said
        given = _decoded(content, f"{place}.{what}")
        calls, content = given if isinstance(given, list) else [given], ""
    read = {"role": _ROLES[role], "content": content}
    if calls:
        if read["role"] != "bot":
            raise InputError(f"{place}: only an assistant's message has tool_calls")
        read["tool_calls"] = read_tool_calls(calls, f"{place}.tool_calls")
    thought = message.get("reasoning_content")
    if thought:
        if not isinstance(thought, str):
            raise InputError(f"{place}.reasoning_content must be a text, not {json_type(thought)}")
        read["content"] = f"<think>\n{thought}\n</think>\n{content}"
    return read


def in_order(messages):
    """Messages of one role that follow each other joined by a newline, tools' results apart.

    Raises:
        InputError: a system text is not the first message, or an answer has no question before it.
    """
    joined = []
    for message in messages:
        before = joined[-1] if joined else None
        if before and before["role"] == message["role"] != "tool" and "tool_calls" not in before:
            text = "\n".join(part for part in (before["content"], message["content"]) if part)
            joined[-1] = {**message, "content": text}
            continue
        if message["role"] == "system" and before:
            raise InputError("has a system text behind a question; it must come first")
        if message["role"] == "bot" and (before is None or before["role"] not in ("user", "tool")):
            raise InputError("an answer has no question before it; a conversation begins with the user's question")
        if message["role"] == "tool" and not (before and (before["role"] == "tool" or before.get("tool_calls"))):
            raise InputError("has a tool's result without a call before it")
        joined.append(message)
    return joined


def _decoded(value, place):
    """What a text holds as JSON; anything else as it is."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        raise InputError(f"{place} is a text that is not JSON; write an object") from None
