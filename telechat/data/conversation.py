"""Conversations: the lines of a fine-tuning file, their turns, and the ids and labels of a turn."""

import dataclasses
import functools
import json
import re
from typing import Optional

import numpy as np

from telechat.errors import InputError

USER_MARKER, BOT_MARKER, END_MARKER = "<_user>", "<_bot>", "<_end>"  # as files spell them, for any model
IGNORED = -100  # label of a token that the loss leaves out

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
    """

    user: int
    bot: int
    end: int
    pad: int
    start: Optional[int] = None

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
        the start.

        Args:
            tokenizer: `Tokenizer`.
            start_token, user_token, bot_token, end_token, pad_token: spelling of a token, or None
                for the default; "" as the start token means that there is none.

        Raises:
            InputError: the tokenizer lacks a token.
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
        return cls(**ids)

    def tokens(self, tokenizer):
        """{"start": {"token": spelling, "id": id}, …} without the start where there is none."""
        return {role: {"token": tokenizer.id_to_token(index), "id": index}
                for role, index in dataclasses.asdict(self).items() if index is not None}


def parse_conversation(record, tokens=()):
    """The turns of one record of a fine-tuning file.

    ``{"input": "<_user>question<_bot>answer<_user>question", "output": "answer"}``, with any number
    of turns, or none of the markers at all: ``{"input": "question", "output": "answer"}``. The
    leading <_user> may be missing, an <_end> after an answer may be there. A marker in "output" is
    text.

    Args:
        record: what JSON gave for the line.
        tokens: (user, bot) spellings that mark a turn beside <_user> and <_bot>.

    Returns:
        list of (question, answer)

    Raises:
        InputError: not such a record; says what is wrong with it.
    """
    text, output = _field(record, "input"), _field(record, "output")
    markers, split = _markers(tuple(tokens))
    parts = split(text)
    if parts[0] == "" and len(parts) > 1:
        parts = parts[1:]
    else:
        parts.insert(0, USER_MARKER)
    said = [(markers[marker], words) for marker, words in zip(parts[::2], parts[1::2])]
    if said[-1] == ("bot", ""):  # "<_user>question<_bot>": the output follows
        said.pop()
    said.append(("bot", output))
    for (role, _), expected in zip(said, ["user", "bot"] * len(said)):
        if role != expected:
            raise InputError(_ORDER[role])
    if len(said) % 2:
        raise InputError(_ORDER["bot"])
    return [(question, answer[:-len(END_MARKER)] if answer.endswith(END_MARKER) else answer)
            for (_, question), (_, answer) in zip(said[::2], said[1::2])]


@functools.lru_cache
def _markers(tokens):
    """Role by marker, and the function that splits a text at the markers and keeps them."""
    roles = {USER_MARKER: "user", BOT_MARKER: "bot", **dict(zip(tokens, ("user", "bot")))}
    return roles, re.compile("(" + "|".join(map(re.escape, roles)) + ")").split


_ORDER = {
    "user": 'in "input" a question follows a question; put <_bot> and the answer between them',
    "bot": 'an answer has no question before it; "input" must end with the question that "output" answers',
}


def _field(record, name):
    if not isinstance(record, dict):
        raise InputError(f'must be a JSON object with the field "{name}", not {_json_type(record)}')
    if name not in record:
        raise InputError(f'lacks the field "{name}"')
    value = record[name]
    if not isinstance(value, str):
        raise InputError(f'"{name}" must be a string, not {_json_type(value)}')
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise InputError(f'"{name}" holds half of a surrogate pair; '
                         "write the whole character") from None
    return value


def _json_type(value):
    return {dict: "an object", list: "an array", str: "a string", bool: "true or false",
            type(None): "null"}.get(type(value), "a number")


def encode_conversation(tokenizer, chat_format, turns):
    """Ids and labels of one conversation, as the incumbent's preprocessing has them.

    Questions and answers are tokenised each on its own, so each begins with the tokenizer's
    leading space; a control token spelt in one is text there.

    Args:
        tokenizer: `Tokenizer`.
        chat_format: `ChatFormat`.
        turns: list of (question, answer).

    Returns:
        (input_ids, labels): two lists of int of the same length. A label is the token's own id for
        answers and end tokens, -100 elsewhere; the shift by one is the loss's work.
    """
    encoded = [[_int32(tokenizer.encode(text, control_tokens=False)) for text in turn] for turn in turns]
    input_ids, labels = conversation_ids(chat_format, encoded)
    return input_ids.tolist(), labels.tolist()


def conversation_ids(chat_format, turns):
    """As `encode_conversation`, of turns whose questions and answers are ids already; int32 arrays all of them."""
    start = _int32([] if chat_format.start is None else [chat_format.start])
    user, bot, end = map(_int32, ([chat_format.user], [chat_format.bot], [chat_format.end]))
    input_ids = np.concatenate([start, *(part for question, answer in turns
                                         for part in (user, question, bot, answer, end))])
    labels = np.full_like(input_ids, IGNORED)
    position = len(start)
    for question, answer in turns:
        answered = slice(position + len(question) + 2, position + len(question) + len(answer) + 3)
        labels[answered] = input_ids[answered]
        position = answered.stop
    return input_ids, labels


def _int32(ids):
    return np.array(ids, np.int32)


def read_conversations(path, tokens=()):
    """All conversations of a JSONL fine-tuning file, in file order.

    Args:
        path: the file; lines with nothing but white space are passed over.
        tokens: as in `parse_conversation`.

    Returns:
        list of conversations, each a list of (question, answer)

    Raises:
        InputError: names the file, and the line where there is one.
    """
    return [_at(path, number, parse_conversation, record, tokens) for number, record in _records(path)]


def read_prompts(path, field="input"):
    """The prompts of a JSONL file of {"input": "…"} lines: list of str, in file order.

    Args:
        path: the file.
        field: name of the field, where it is another one.

    Raises:
        InputError: names the file, and the line where there is one.
    """
    return [_at(path, number, _field, record, field) for number, record in _records(path)]


def _records(path):
    """(line number, decoded JSON) of every line that is not blank."""
    try:
        with open(path, "rb") as file:
            lines = file.read().split(b"\n")
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}); give a JSONL file") from None
    records = []
    for number, line in enumerate(lines, start=1):
        if number == 1 and line.startswith(b"\xef\xbb\xbf"):
            line = line[3:]
        if line.strip():
            records.append((number, _at(path, number, _json, line)))
    if not records:
        raise InputError(f"{path} holds no line of JSON; give a JSONL file with an object a line")
    return records


def _json(line):
    try:
        return json.loads(line.decode("utf-8"))
    except UnicodeDecodeError:
        raise InputError("is not UTF-8; save the file as UTF-8") from None
    except (ValueError, RecursionError) as error:
        reason = getattr(error, "msg", "nested too deeply")
        raise InputError(f"is not valid JSON ({reason})") from None


def _at(path, number, function, *arguments):
    try:
        return function(*arguments)
    except InputError as error:
        raise InputError(f"{path}, line {number}: {error}") from None
