"""Thoughts and calls of tools in OpenAI's form, whole and streamed."""

import json
import secrets

from telechat.data.answer_stream import AnswerParts


def together(before, part):
    """Two `AnswerParts`, one behind the other, as one."""
    return AnswerParts(before.thought + part.thought, before.calls + part.calls, before.fault or part.fault)


def message(text, parts):
    """The fields of a whole answer's message: content, and reasoning_content, tool_calls and tool_call_error if any."""
    fields = {"content": text if text or not parts.calls else None}
    if parts.thought:
        fields["reasoning_content"] = parts.thought.rstrip("\n")
    if parts.calls:
        fields["tool_calls"] = [_call(call) for call in parts.calls]
    if parts.fault:
        fields["tool_call_error"] = parts.fault
    return fields


def deltas(part, calls):
    """What is to be streamed of an `AnswerParts`; ``calls``: how many of the answer's calls were before."""
    if part.thought:
        yield {"reasoning_content": part.thought}
    for number, call in enumerate(part.calls, start=calls):
        yield {"tool_calls": [{"index": number, **_call(call)}]}
    if part.fault:
        yield {"tool_call_error": part.fault}


def finish_reason(reason, parts):
    """OpenAI's: an answer that ends by itself and has calls ends for these."""
    return "tool_calls" if parts.calls and reason == "stop" else reason


def _call(call):
    return {"id": f"call_{secrets.token_hex(12)}", "type": "function",
            "function": {"name": call["name"], "arguments": json.dumps(call["arguments"], ensure_ascii=False)}}
