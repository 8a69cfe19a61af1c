"""From a chat, or from a line of text, to the ids of a prompt."""

import re

from telechat.data.conversation import BOT_MARKER, END_MARKER, USER_MARKER, ChatFormat, join_messages
from telechat.data.messages import in_order
from telechat.errors import InputError


def build_prompt(tok, history, question, max_length, chat_format=None, honour_leading_marker=True, fit=False,
                 tools=None, thinking=True):
    """The prompt of a chat: [start] user question bot, with as much history before it as fits.

    As the official code: a user's message is the user token and its text, a bot's message the bot
    token, its text and the end token, each text tokenised on its own. Of the question's ids the
    last max_length - 1 are kept. Then messages are put in front of it, newest first, up to the
    first one that, together with the question *alone*, has max_length or more ids; that one and all
    older ones are dropped. So a prompt with history may be longer than max_length, and one with
    a question cut off may have max_length + 1 ids; ``fit=True`` is for who has only that much room.

    Messages of one role that follow each other are one, joined by a newline (`join_messages`), and a user's message at
    the end of the history is joined to the question: the model knows turns of one question and one answer.

    Text is text: a control token spelt in a message never becomes the control token. The one
    exception is a user marker at the very front of a user's text: the published files put one there,
    and the official code makes a second user token of it. For a tokenizer without <_user>
    (52B's) that marker only says what the format says anyhow, and is left out.

    Args:
        tok: `telechat.Tokenizer`.
        history: list of {"role": "user" or "bot", "content": str}, oldest first.
        question: str.
        max_length: int, at least 3.
        chat_format: `ChatFormat`; None: that of the model the tokenizer belongs to.
        honour_leading_marker: False: a marker at the front is text too (for what a person types).
        fit: True: the whole prompt has at most max_length ids, the format's start token included,
            and its history begins with a user's message. So it always is with TeleChat2 and 3.
        tools, thinking: of `ChatTemplate.parts`, for TeleChat2 and 3; their history may hold "system" and "tool"
            messages too, and question may be None where the last of them is a tool's result.

    Returns:
        list[int]

    Raises:
        InputError: a message is not such a dict, or max_length is below 3.
    """
    chat_format = chat_format or ChatFormat.for_tokenizer(tok)
    if chat_format.template is not None:
        return _template_prompt(tok, history, question, max_length, chat_format, tools, thinking)
    if tools:
        raise InputError("this model was not trained with tools; leave them out")
    start = [] if chat_format.start is None else [chat_format.start]
    least = len(start) + 3 if fit else 3
    if isinstance(max_length, bool) or not isinstance(max_length, int) or max_length < least:
        raise InputError(f"max_length must be a whole number of {least} or more to hold a prompt, "
                         f"not {max_length!r}")
    if not isinstance(question, str):
        raise InputError(f"the question must be a string, not {type(question).__name__}")
    if not isinstance(history, (list, tuple)):
        raise InputError(f"the history must be a list of messages, not {type(history).__name__}")
    said = join_messages([*(_checked(message, number) for number, message in enumerate(history, start=1)),
                          ("user", question)])
    question = said.pop()[1]
    messages = [_encode_message(tok, role, text, chat_format, honour_leading_marker) for role, text in said]
    room = max_length - len(start) - 2 if fit else max_length - 1
    asked = _encode_content(tok, question, chat_format, honour_leading_marker)[-room:]
    prompt = [chat_format.user, *asked, chat_format.bot]
    if fit:
        kept = _newest_that_fit(messages, room + 2 - len(prompt))
        while kept and kept[0][0] != chat_format.user:
            kept.pop(0)
    else:
        alone = len(start) + len(prompt)
        first = len(messages)
        while first and len(messages[first - 1]) + alone < max_length:
            first -= 1
        kept = messages[first:]
    return start + [index for message in kept for index in message] + prompt


def _template_prompt(tok, history, question, max_length, chat_format, tools, thinking):
    """`build_prompt` for a format with a template: system text and question stay, the oldest turns go first.

    Of a question that does not fit even so, the last ids are kept.
    """
    if isinstance(max_length, bool) or not isinstance(max_length, int) or max_length < 1:
        raise InputError(f"max_length must be a whole number of 1 or more to hold a prompt, not {max_length!r}")
    if not isinstance(history, (list, tuple)):
        raise InputError(f"the history must be a list of messages, not {type(history).__name__}")
    messages = [_checked_message(message, number) for number, message in enumerate(history, start=1)]
    if question is not None:
        if not isinstance(question, str):
            raise InputError(f"the question must be a string, not {type(question).__name__}")
        messages.append({"role": "user", "content": question.removeprefix(USER_MARKER)})
    messages = in_order(messages)
    if not messages or messages[-1]["role"] not in ("user", "tool"):
        raise InputError("the last message must be a question or a tool's result")

    def encode(kept):
        parts = chat_format.template.parts(chat_format, kept, tools, prompt=True, thinking=thinking)
        return [index for part in parts for index in part_ids(tok, part)]

    prompt = encode(messages)
    while len(prompt) > max_length:
        first = 1 if messages[0]["role"] == "system" else 0
        following = [number for number in range(first + 1, len(messages)) if messages[number]["role"] == "user"]
        if not following:
            break
        del messages[first:following[0]]
        prompt = encode(messages)
    if len(prompt) <= max_length:
        return prompt
    return _cut(prompt, chat_format, max_length)


def _cut(prompt, chat_format, max_length):
    """The end of a prompt's question, with what stands in front of and behind its text."""
    first = len(prompt) - prompt[::-1].index(chat_format.user)  # behind the last user token
    behind = prompt[::-1].index(chat_format.bot) + 1  # tokens from the last bot token on
    if max_length - first - behind < 1:
        raise InputError(f"max_length {max_length} leaves no room for the question behind the system text and tools of "
                         f"{first} tokens; give more, or shorten these")
    return prompt[:first] + prompt[first - max_length:]


def part_ids(tok, part):
    """The ids of a part of `ChatTemplate.parts`."""
    return [part.content] if isinstance(part.content, int) else tok.encode(part.content, control_tokens=False)


def _checked_message(message, number):
    if not isinstance(message, dict) or not isinstance(message.get("content"), str) \
            or message.get("role") not in ("system", "user", "bot", "tool"):
        raise InputError(f'message {number} of the history must be {{"role": "system", "user", "bot" or "tool", '
                         f'"content": a string}}, not {message!r}')
    return message


def _newest_that_fit(messages, room):
    first = len(messages)
    while first and len(messages[first - 1]) <= room:
        first -= 1
        room -= len(messages[first])
    return messages[first:]


def _checked(message, number):
    """(role, text) of a message of the history."""
    if not isinstance(message, dict) or not isinstance(message.get("content"), str):
        raise InputError(f'message {number} of the history must be {{"role": "user" or "bot", '
                         f'"content": a string}}, not {message!r}')
    if message.get("role") not in ("user", "bot"):
        raise InputError(f'the role of message {number} of the history must be "user" or "bot", '
                         f"not {message.get('role')!r}")
    return message["role"], message["content"]


def _encode_message(tok, role, text, chat_format, honour_leading_marker):
    if role == "user":
        return [chat_format.user, *_encode_content(tok, text, chat_format, honour_leading_marker)]
    return [chat_format.bot, *tok.encode(text, control_tokens=False), chat_format.end]


def _encode_content(tok, text, chat_format, honour_leading_marker):
    if honour_leading_marker:
        marker = tok.id_to_token(chat_format.user)
        if text.startswith(marker):
            return tok.encode(marker) + tok.encode_continuation(text[len(marker):])
        if text.startswith(USER_MARKER) and tok.token_to_id(USER_MARKER) is None:
            text = text[len(USER_MARKER):]
    return tok.encode(text, control_tokens=False)


def parse_prompt(tok, text, chat_format=None):
    """The prompt that a line of text with control tokens spells out.

    The text is cut at the control tokens and each stretch between them is tokenised on its own, so
    "<_user>question<_bot>" has the ids that the question has in training. Apart from these:

    - text without any control token is a user's question: the user token goes before, the bot token
      behind it;
    - <_user>, <_bot> and <_end> mean the format's tokens where the tokenizer (52B's) lacks them;
    - where the format has a start token, it goes in front unless it is there;
    - with TeleChat2 and 3 a text of questions and answers in <_user>, <_bot> and <_end> alone, and one without any
      control token, is a chat as `build_prompt` has it, its system text and thought included.

    Args:
        tok: `telechat.Tokenizer`.
        text: str.
        chat_format: `ChatFormat`; None: that of the model the tokenizer belongs to.

    Returns:
        list[int]

    Raises:
        InputError: ``text`` is not a str or holds nothing.
    """
    chat_format = chat_format or ChatFormat.for_tokenizer(tok)
    if not isinstance(text, str) or not text:
        raise InputError("a prompt must be a string that is not empty")
    if chat_format.template is not None:
        messages = _spelt_messages(text)
        if messages:
            return build_prompt(tok, messages[:-1], messages[-1]["content"], 1 << 40, chat_format)
    spellings = {USER_MARKER: chat_format.user, BOT_MARKER: chat_format.bot, END_MARKER: chat_format.end}
    spellings.update({tok.id_to_token(index): index for index in tok.control_ids})
    spellings.update({item["token"]: item["id"] for item in chat_format.tokens(tok).values()})
    longest_first = sorted(spellings, key=len, reverse=True)
    stretches = re.split("(" + "|".join(map(re.escape, longest_first)) + ")", text)
    if len(stretches) == 1:
        ids = [chat_format.user, *tok.encode(text, control_tokens=False), chat_format.bot]
    else:
        ids = []
        for number, stretch in enumerate(stretches):
            if number % 2:
                ids.append(spellings[stretch])
            elif stretch:
                ids += tok.encode(stretch, control_tokens=False)
    if chat_format.start is not None and ids[0] != chat_format.start:
        ids.insert(0, chat_format.start)
    return ids


def _spelt_messages(text):
    """The messages of a text that spells questions and answers alone and ends with a question; None for any other."""
    turn = f"{USER_MARKER}(.*?){BOT_MARKER}(.*?){END_MARKER}\n?"
    if not re.search("<_[a-z]+>", text):
        return [{"role": "user", "content": text}]
    whole = re.fullmatch(f"((?:{turn})*){USER_MARKER}(.*?)(?:{BOT_MARKER})?", text, re.DOTALL)
    if not whole or re.search("<_[a-z]+>", whole[4]):
        return None
    messages = []
    for question, answer in re.findall(turn, whole[1], re.DOTALL):
        messages += [{"role": "user", "content": question}, {"role": "bot", "content": answer}]
    return [*messages, {"role": "user", "content": whole[4]}]
