"""The answer of a model that thinks and calls tools, taken apart while its tokens arrive."""

import typing

from telechat.data.chat_template import THINK
from telechat.data.text_stream import TextStream


class AnswerParts(typing.NamedTuple):
    """What of an answer is no content.

    Attributes:
        thought (str): text of the thought.
        calls (tuple): calls of tools, {"name": str, "arguments": dict}, each when it is complete.
        fault (str): why a call was none and is content as it was written; None.
    """

    thought: str = ""
    calls: tuple = ()
    fault: str = None


class AnswerStream:
    """`TextStream` of an answer's content alone; the rest is had from `take`.

    Thoughts end, and calls begin and end, at tokens: a text that spells one is text.

    Args:
        tokenizer (Tokenizer): decodes.
        template (ChatTemplate): whose answer it is.
        thinking (bool): whether the prompt has opened a thought.
        tools (list): definitions of the tools that may be called; None: calls are content.
    """

    def __init__(self, tokenizer, template, thinking, tools=()):
        self._tokenizer, self._template, self._tools = tokenizer, template, tools
        self._stream = TextStream(tokenizer)
        self._place = "thought" if thinking and template.think is not None else "content"
        self._fresh = True  # no text of this place yet: newlines in front of one are not part of it
        self._call = ""
        self._thought, self._calls, self._fault = "", [], None

    @property
    def drops_space(self):
        """As of `TextStream`."""
        return self._stream.drops_space

    def is_content(self, token):
        """Whether the next token, this one, is part of the content."""
        return self._place == "content" and token not in self._template.marks

    def put(self, token):
        """Take one token id; return the content that is final now."""
        template = self._template
        if token == template.think and self._place == "content":
            return self._move("thought")
        if token == template.end_of_thought and self._place == "thought":
            return self._move("content")
        if self._tools is not None and token == template.tool_tokens["<tool_call>"]:
            return self._move("call")
        if self._place == "call" and token == template.tool_tokens["</tool_call>"]:
            return self._move("content")
        if token in template.marks and self._place != "thought":
            text, self._stream = self._stream.end(), TextStream(self._tokenizer)
            return self._said(text + template.spelling(token))
        return self._said(self._stream.put(token))

    def end(self):
        """What was held back; a call that was begun and not ended is content."""
        content = self._said(self._stream.end())
        if self._place == "call":
            self._fault = "a call of a tool was begun and not ended"
            content += f"<tool_call>{self._call}"
            self._place = "content"
        return content

    def take(self):
        """`AnswerParts` that have come since the last call."""
        taken = AnswerParts(self._thought, tuple(self._calls), self._fault)
        self._thought, self._calls, self._fault = "", [], None
        return taken

    def _move(self, place):
        content = self._said(self._stream.end())
        if self._place == "call":
            content += self._close_call()
        self._stream, self._place, self._fresh = TextStream(self._tokenizer), place, True
        return content

    def _close_call(self):
        text, self._call = self._call, ""
        try:
            self._calls.append(self._template.read_call(text, self._tools))
            return ""
        except ValueError:
            self._fault = self._template.FAULT
            return f"<tool_call>{text}</tool_call>"

    def _said(self, text):
        if self._place == "call":
            self._call += text
            return ""
        if self._fresh:
            text = text.lstrip("\n")
            self._fresh = not text
        if self._place == "thought":
            self._thought += text
            return ""
        return text


def spelt_answer(tokenizer, template, ids, thinking=True):
    """Iterate over the text of an answer with its tokens for thoughts and calls spelt out, as `ChatTemplate` reads it.

    Args:
        ids: iterable of token ids, as they come.
        template (ChatTemplate): None for a model without.
        thinking (bool): whether the prompt has opened a thought; it is opened in the text too.
    """
    text = TextStream(tokenizer)
    if template is not None and template.think is not None and thinking:
        yield THINK + template.OPENING
    for token in ids:
        if template is not None and token in template.marks:
            piece, text = text.end() + template.spelling(token), TextStream(tokenizer)
        else:
            piece = text.put(token)
        if piece:
            yield piece
    piece = text.end()
    if piece:
        yield piece
