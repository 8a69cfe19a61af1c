"""Conversations: the lines of a fine-tuning file and their turns."""

import dataclasses
import functools
import re
from typing import Optional

from telechat.data.chat_template import ChatTemplate
from telechat.data.json_lines import in_file, read_records
from telechat.data.messages import Conversation, in_order, read_message, read_tools
from telechat.data.model_template import template_for
from telechat.data.record_forms import LISTED, check_fields, read_history, read_messages, read_system, text_field
from telechat.errors import InputError

USER_MARKER, BOT_MARKER, END_MARKER = "<_user>", "<_bot>", "<_end>"  # as files spell them, for any model

# The tokens of 7B and 12B, and those of 52B, whose tokenizer has no <_user>.
_TELECHAT_TOKENS = {"start": (), "user": (USER_MARKER,), "bot": (BOT_MARKER,), "end": (END_MARKER,),
                    "pad": ("<_pad>", "<pad>")}
_RESERVED_TOKENS = {"start": ("<reserve3>",), "user": ("<reserve1>",), "bot": ("<reserve2>",),
                    "end": ("</s>",), "pad": ("<pad>",)}


@dataclasses.dataclass(frozen=True)
class ChatFormat:
    """The token ids that hold a conversation together.

    A conversation is [start] and then, turn by turn, user, question, bot, answer, end.

    Attributes:
        user, bot, end, pad: int.
        start: int, or None where a conversation begins with the user token.
        template: `ChatTemplate` of TeleChat2 and 3, which have a system text, tools and thoughts; None for
            TeleChat-1.
    """

    user: int
    bot: int
    end: int
    pad: int
    start: Optional[int] = None
    template: Optional[ChatTemplate] = None

    def __post_init__(self):
        if len({self.user, self.bot, self.end}) < 3:
            raise InputError("the user, bot and end tokens must be three different tokens; "
                             "check --user_token, --bot_token and --end_token")

    @classmethod
    def for_tokenizer(cls, tokenizer, start_token=None, user_token=None, bot_token=None, end_token=None,
                      pad_token=None):
        """The format of the model that ``tokenizer`` belongs to, tokens given by name replaced.

        A tokenizer with <_user> and <_bot> is 7B's or 12B's: these, <_end>, <_pad> (or <pad>), no
        start token. Any other one is 52B's: <reserve1>, <reserve2>, </s>, <pad>, and <reserve3> at
        the start. TeleChat2's and 3's have a template besides; with a start token they have none, and their
        conversations are those of TeleChat2's first release (September 2024): a start token and bare turns.

        Args:
            tokenizer: `Tokenizer`.
            start_token, user_token, bot_token, end_token, pad_token: spelling of a token, or None
                for the default; "" as the start token means that there is none.

        Raises:
            InputError: the tokenizer lacks a token, or its model has no use for a start token.
        """
        has_markers = None not in (tokenizer.token_to_id(USER_MARKER), tokenizer.token_to_id(BOT_MARKER))
        defaults = _TELECHAT_TOKENS if has_markers else _RESERVED_TOKENS
        given = {"start": start_token, "user": user_token, "bot": bot_token, "end": end_token,
                 "pad": pad_token}
        ids = {}
        for role, token in given.items():
            names = defaults[role] if token is None else (token,)
            if role == "start" and names in ((), ("",)):
                continue
            found = [index for index in map(tokenizer.token_to_id, names) if index is not None]
            if not found:
                raise InputError(f"--{role}_token {names[0]}: {tokenizer.path} has no such token; "
                                 "name one that it has")
            ids[role] = found[0]
        template = template_for(tokenizer)
        if start_token and template is not None and template.think is not None:
            raise InputError(f"--start_token {start_token}: TeleChat3's conversations begin with their system text; "
                             "leave it out")
        return cls(**ids, template=None if start_token else template)

    def tokens(self, tokenizer):
        """{"start": {"token": spelling, "id": id}, …} without the start where there is none."""
        return {role: {"token": tokenizer.id_to_token(index), "id": index}
                for role in _TELECHAT_TOKENS if (index := getattr(self, role)) is not None}


def parse_conversation(record, tokens=(), system="refuse"):
    """The turns of one record of a fine-tuning file.

    ``{"input": "<_user>question<_bot>answer<_user>question", "output": "answer"}``, with any number
    of turns, or none of the markers at all: ``{"input": "question", "output": "answer"}``. The
    leading <_user> may be missing, an <_end> after an answer may be there. A marker in "output" is
    text. ``history`` (a list of [question, answer]) may give turns that go before.

    The forms of other trainers are read too, see `telechat.data.record_forms.read_messages`; in these
    a marker is text everywhere.

    Args:
        record: what JSON gave for it.
        tokens: (user, bot) spellings that mark a turn beside <_user> and <_bot>.
        system: what becomes of a system text, for which the format has no place: "refuse", or "prepend":
            it goes in front of the first question, in a line of its own, as in tools/serve.py.

    Returns:
        list of (question, answer)

    Raises:
        InputError: not such a record; says what is wrong with it.
    """
    messages = read_messages(record) if isinstance(record, dict) else None
    if messages is None:
        messages = _marked_messages(record, tokens)
    system_texts = [text for role, text in messages if role == "system" and text]
    messages = join_messages([message for message in messages if message[0] != "system" or message[1]])
    if system_texts:
        if system == "refuse":
            raise InputError("has a system text, and TeleChat was not trained with one; put it into the question, or "
                             "give --system prepend, which puts it in front of the first question")
        if messages[0][0] != "system" or len([role for role, _ in messages if role == "system"]) > 1:
            raise InputError("has a system text behind a question; it must come first")
        messages.pop(0)
    for (role, _), expected in zip(messages, ["user", "bot"] * len(messages)):
        if role != expected:
            raise InputError("an answer has no question before it; a conversation begins with the user's question")
    if not messages or len(messages) % 2:
        raise InputError("ends with a question; it must end with the answer to learn")
    turns = [(question, answer) for (_, question), (_, answer) in zip(messages[::2], messages[1::2])]
    if system_texts:
        turns[0] = ("\n".join([*system_texts, turns[0][0]]), turns[0][1])
    return turns


def parse_messages(record, tokens=()):
    """A record as a `Conversation` with system text, tools and thoughts, for a format that has a template.

    The forms are those of `parse_conversation`; OpenAI's and ShareGPT's may have "tools", "tool_calls", tools' results
    and "reasoning_content" besides. The publisher's ``dialog`` spells calls and results in its texts.

    Args:
        record, tokens: as of `parse_conversation`.

    Raises:
        InputError: not such a record; says what is wrong with it.
    """
    form = next((name for name in LISTED if isinstance(record, dict) and name in record), None)
    if form:
        check_fields(record, {form, "system", "tools", *LISTED[form]})
        given = record[form]
        if not isinstance(given, list) or not given:
            raise InputError(f'"{form}" must be a list with at least a question and an answer')
        messages = [read_message(message, f"{form}[{number}]") for number, message in enumerate(given)]
        messages = [_plain(*message) for message in read_system(record)] + messages
    else:
        pairs = read_messages(record) if isinstance(record, dict) else None
        messages = [_plain(*pair) for pair in (_marked_messages(record, tokens) if pairs is None else pairs)]
    messages = in_order(messages)
    if messages[-1]["role"] != "bot":
        raise InputError("ends with a question; it must end with the answer to learn")
    tools = read_tools(record["tools"]) if form and record.get("tools") else None
    return Conversation(messages, tools, spells_tokens=form == "dialog")


def _plain(role, text):
    return {"role": role, "content": text}


def join_messages(messages):
    """Messages of one role that follow each other as one, joined by a newline: TeleChat was trained with turns of one
    question and one answer. So it is in training data, in a chat and in the server alike.

    Args:
        messages: list of (role, text).

    Returns:
        list of (role, text) in which no role comes twice in a row; an empty text adds no line.
    """
    joined = []
    for role, text in messages:
        if joined and joined[-1][0] == role:
            joined[-1] = (role, "\n".join(part for part in (joined[-1][1], text) if part))
        else:
            joined.append((role, text))
    return joined


def _marked_messages(record, tokens):
    """The messages of a record of our own form, (role, text)."""
    text, output = text_field(record, "input"), text_field(record, "output")
    check_fields(record, {"input", "output", "history", "system"})
    markers, split = _markers(tuple(tokens))
    parts = split(text)
    if not parts[0].strip() and len(parts) > 1:
        parts = parts[1:]
    else:
        parts.insert(0, USER_MARKER)
    said = [(markers[marker], words) for marker, words in zip(parts[::2], parts[1::2])]
    if said[-1] == ("bot", ""):  # "<_user>question<_bot>": the output follows
        said.pop()
    if not said or said[-1][0] == "bot":
        raise InputError('an answer has no question before it; "input" must end with the question that "output" answers')
    said.append(("bot", output))
    return read_system(record) + read_history(record) + [
        (role, words[:-len(END_MARKER)] if role == "bot" and words.endswith(END_MARKER) else words)
        for role, words in said]


@functools.lru_cache
def _markers(tokens):
    """Role by marker, and the function that splits a text at the markers and keeps them."""
    roles = {USER_MARKER: "user", BOT_MARKER: "bot", **dict(zip(tokens, ("user", "bot")))}
    return roles, re.compile("(" + "|".join(map(re.escape, roles)) + ")").split


def read_conversations(path, tokens=(), system="refuse", template=None):
    """All conversations of a fine-tuning file, in file order.

    Args:
        path: the file, JSONL or one JSON array; see `read_records`.
        tokens, system: as in `parse_conversation`.
        template (ChatTemplate): of the model's format, if it has one.

    Returns:
        list of conversations, each a list of (question, answer), or with a template a `Conversation`.

    Raises:
        InputError: names the file, and the line where there is one.
    """
    if template is not None:
        return [in_file(path, place, parse_messages, record, tokens) for place, record in read_records(path)]
    return [in_file(path, place, parse_conversation, record, tokens, system) for place, record in read_records(path)]


def read_prompts(path, field="input"):
    """The prompts of a file of {"input": "…"} lines: list of str, in file order.

    Args:
        path: the file.
        field: name of the field, where it is another one. An "output" beside it, as in a fine-tuning file, is the
            answer that belongs to it and is no part of a prompt.

    Raises:
        InputError: names the file, and the line where there is one.
    """
    return [in_file(path, place, _prompt, record, field) for place, record in read_records(path)]


def _prompt(record, field):
    prompt = text_field(record, field)
    check_fields(record, {field, "output"})
    return prompt
