"""The messages, tools and thoughts of a chat request, checked: TeleChat-1's turns, and what TeleChat2 and 3 have besides."""

from telechat.data.messages import in_order, read_message, read_tools
from telechat.errors import InputError
from telechat.serving.api_error import APIError, short


def plain_messages(body, system_rule):
    """(history, question) of a chat of TeleChat-1, as `build_prompt` takes them.

    system_rule: what becomes of a system message, "refuse" or "prepend".

    Raises:
        APIError: a message is not as it must be.
    """
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages:
        raise APIError(400, "messages must be a list with at least one message", "messages")
    turns, system = [], []
    for number, message in enumerate(messages):
        place = f"messages[{number}]"
        if not isinstance(message, dict):
            raise APIError(400, f"{place} must be an object with role and content", place)
        role, text = message.get("role"), _content(message.get("content"), place)
        if role in ("system", "developer"):
            if system_rule == "refuse":
                raise APIError(400, f"{place} is a system message, and TeleChat was not trained with one; put it into the "
                                   "question, or start the server with --system prepend", place)
            if turns:
                raise APIError(400, f"{place}: system messages must come first", place)
            system.append(text)
        elif message.get("tool_calls"):
            raise APIError(400, f"{place}.tool_calls: this model was not trained with tools; leave them out", place)
        elif role in ("user", "assistant"):
            turns.append({"role": "user" if role == "user" else "bot", "content": text})
        else:
            raise APIError(400, f'{place}.role must be "user", "assistant" or "system", not {str(role)[:40]!r}', place)
    if not turns or turns[-1]["role"] != "user":
        raise APIError(400, "the last of messages must be the user's", "messages")
    if turns[0]["role"] != "user":
        raise APIError(400, "the first of messages must be the user's", "messages")
    if system:
        turns[0] = {"role": "user", "content": "\n".join([*system, turns[0]["content"]])}
    return turns[:-1], turns[-1]["content"]


def template_messages(body):
    """(history, question) of a chat of TeleChat2 or 3; question None where a tool's result comes last.

    Raises:
        APIError: a message is not as it must be.
    """
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages:
        raise APIError(400, "messages must be a list with at least one message", "messages")
    read = []
    for number, message in enumerate(messages):
        place = f"messages[{number}]"
        if isinstance(message, dict) and message.get("role") not in ("system", "developer", "user", "assistant", "tool"):
            raise APIError(400, f'{place}.role must be "system", "user", "assistant" or "tool", '
                               f"not {short(message.get('role'))}", place)
        try:
            read.append(read_message(message, place))
        except InputError as error:
            raise APIError(400, str(error), place) from None
    try:
        read = in_order(read)
    except InputError as error:
        raise APIError(400, f"messages: {error}", "messages") from None
    if read[-1]["role"] not in ("user", "tool"):
        raise APIError(400, "the last of messages must be the user's or a tool's", "messages")
    return (read, None) if read[-1]["role"] == "tool" else (read[:-1], read[-1]["content"])


def read_offer(body):
    """The tools that a chat offers, or None; APIError where they are not as they must be."""
    choice = body.get("tool_choice")
    if choice not in (None, "auto", "none"):
        raise APIError(400, f'tool_choice must be "auto" or "none", not {short(choice)}', "tool_choice",
                       "unsupported_parameter")
    try:
        tools = read_tools(body.get("tools"))
    except InputError as error:
        raise APIError(400, str(error), "tools") from None
    return None if choice == "none" else tools


def read_thinking(body, template):
    """Whether the answer begins with a thought: as the model does, unless ``enable_thinking`` is false.

    template (ChatTemplate): None for a model without.
    """
    thinks = template is not None and template.think is not None
    given = body.get("chat_template_kwargs")
    if given is None or template is None:
        return thinks
    if not isinstance(given, dict) or set(given) - {"enable_thinking"} or not isinstance(
            given.get("enable_thinking", True), bool):
        raise APIError(400, 'chat_template_kwargs must be {"enable_thinking": true or false}', "chat_template_kwargs")
    if given.get("enable_thinking") and not thinks:
        raise APIError(400, "enable_thinking is true, and this model does not think; leave it out", "chat_template_kwargs")
    return thinks and given.get("enable_thinking", True)


def _content(content, place):
    if isinstance(content, str):
        return content
    if isinstance(content, list) and content and all(
            isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)
            for part in content):
        return "".join(part["text"] for part in content)
    raise APIError(400, f'{place}.content must be a text, or a list of {{"type": "text", "text": …}}', place)
