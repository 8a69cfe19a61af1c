"""The forms in which people have conversations: which fields a record may have, and the messages that they stand for.

Nothing of a record is left out: a field that is not known is refused by its name, unless it is empty or one of
`DESCRIBING`, which say of a record where it is from and hold nothing that was said.
"""

import json

from telechat.errors import InputError

DESCRIBING = frozenset({"id", "idx", "index", "uid", "source", "dataset", "category", "lang", "language"})
ROLES = {"user": "user", "human": "user", "assistant": "bot", "gpt": "bot", "bot": "bot", "chatgpt": "bot",
         "system": "system", "developer": "system"}
_EMPTY = (None, "", [], {})
# The field that holds a record's messages, and those that go with it beside "system".
LISTED = {"messages": frozenset(), "conversations": frozenset(), "dialog": frozenset({"multiturn", "tool"})}


def text_field(record, name):
    """The string in a field.

    Raises:
        InputError: the record is no object, lacks the field, or has something else in it.
    """
    if not isinstance(record, dict):
        raise InputError(f'must be a JSON object with the field "{name}", not {json_type(record)}')
    if name not in record:
        raise InputError(f'lacks the field "{name}"')
    value = record[name]
    if not isinstance(value, str):
        raise InputError(f'"{name}" must be a string, not {json_type(value)}')
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise InputError(f'"{name}" holds half of a surrogate pair; '
                         "write the whole character") from None
    return value


def json_type(value):
    """What JSON calls the kind of a value."""
    return {dict: "an object", list: "an array", str: "a string", bool: "true or false",
            type(None): "null"}.get(type(value), "a number")


def check_fields(record, known, where=""):
    """Refuse a field of ``record`` (dict) that is not ``known`` and says something; ``where`` is put in front."""
    for name, value in record.items():
        if name not in known and name not in DESCRIBING and value not in _EMPTY:
            raise InputError(f"{where}has the field {json.dumps(name, ensure_ascii=True)[:60]}, which is not understood "
                             "here; remove it, or put what it says into the question")


def read_messages(record):
    """The messages of a record in one of the forms that other trainers have.

    - Alpaca: ``instruction``, ``input`` and ``output``, with ``history`` (a list of [question, answer]) and ``system``;
      the question is the instruction and, in a new line, the input.
    - ShareGPT: ``conversations``, a list of ``{"from": "human" or "gpt", "value": …}``, with ``system``.
    - OpenAI: ``messages``, a list of ``{"role": "user" or "assistant", "content": …}``.
    - TeleChat2's publisher: ``dialog``, a list of ``{"role": "user" or "bot", "content": …}``, with ``system``, ``multiturn``
      and ``tool``, of which the last two say nothing that the texts do not.

    Args:
        record (dict): one record.

    Returns:
        list of (role, text), role "system", "user" or "bot"; None where the record is of our own form.

    Raises:
        InputError: a field is missing, wrong or not known.
    """
    for name, beside in LISTED.items():
        if name in record:
            check_fields(record, {name, "system", *beside})
            return read_system(record) + _listed(record[name], name)
    if "instruction" in record:
        check_fields(record, {"instruction", "input", "output", "history", "system"})
        asked = [text_field(record, name) for name in ("instruction", "input") if record.get(name) is not None]
        question = "\n".join(text for text in asked if text)
        return (read_system(record) + read_history(record)
                + [("user", question), ("bot", text_field(record, "output"))])
    return None


def read_history(record):
    """The messages of a record's ``history``, which our own form may have too, (role, text) each; InputError of another form."""
    messages = []
    history = record.get("history")
    if history in _EMPTY:
        return messages
    for number, turn in enumerate(history if isinstance(history, list) else [None], start=1):
        if not isinstance(turn, list) or len(turn) != 2:
            raise InputError('"history" must be a list of [question, answer]')
        parts = {"question": turn[0], "answer": turn[1]}
        messages += [(role, named_text(parts, part, f"turn {number} of history"))
                     for role, part in (("user", "question"), ("bot", "answer"))]
    return messages


def read_system(record):
    """The message of a record's ``system``, in a list that is empty where there is none.

    Beside a ``dialog`` it ends with the line break that the template puts behind a system text.
    """
    if record.get("system") in _EMPTY:
        return []
    text = text_field(record, "system")
    return [("system", text.removesuffix("\n") if "dialog" in record else text)]


def _listed(given, name):
    if not isinstance(given, list) or not given:
        raise InputError(f'"{name}" must be a list with at least a question and an answer, not {json_type(given)}'
                         if not isinstance(given, list) else f'"{name}" is empty')
    messages = []
    for number, message in enumerate(given):
        place = f"{name}[{number}]"
        if not isinstance(message, dict):
            raise InputError(f"{place} must be an object, not {json_type(message)}")
        who, what = ("from", "value") if "from" in message or "value" in message else ("role", "content")
        check_fields(message, {who, what}, f"{place} ")
        role = named_text(message, who, place)
        if role not in ROLES:
            raise InputError(f"{place}: {who} must be one of {', '.join(ROLES)}, not {json.dumps(role)[:60]}")
        messages.append((ROLES[role], text_of(message, what, place)))
    return messages


def text_of(message, name, place):
    """The text in a message's field, which may be OpenAI's list of parts too."""
    if isinstance(message.get(name), list):
        return _parts(message[name], f"{place}.{name}")
    return named_text(message, name, place)


def _parts(content, place):
    """The text of OpenAI's list of parts."""
    texts = []
    for part in content:
        if not isinstance(part, dict) or part.get("type") != "text":
            raise InputError(f'{place} must be a text, or a list of {{"type": "text", "text": …}}')
        check_fields(part, {"type", "text"}, f"{place} ")
        texts.append(named_text(part, "text", place))
    return "".join(texts)


def named_text(record, name, place):
    """`text_field`, with the place named in the InputError where it is wrong."""
    try:
        return text_field(record, name)
    except InputError as error:
        raise InputError(f"{place}: {error}") from None
