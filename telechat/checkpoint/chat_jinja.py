"""The chat format of a model as a Jinja template, as transformers and llama.cpp read it."""

import json


def chat_jinja(chat, spelling, space):
    """Jinja for turns, with the system text and the opening thought of TeleChat2 and 3.

    TeleChat's texts are tokenised each on its own, so each begins with the tokenizer's leading space.

    Args:
        chat (ChatFormat): the format.
        spelling (dict): role → its control token as it is written.
        space (str): what has to stand in front of each text for that: " " where the library puts a space in front of the
            whole alone (transformers), "" where it does so behind each control token (llama.cpp), or where the tokenizer
            has none.
    """
    user, bot, end = (json.dumps(spelling[role], ensure_ascii=False) for role in ("user", "bot", "end"))
    content = f" + '{space}' + message['content']" if space else " + message['content']"
    opening, system, thought, answer = "", "", "", bot
    if "start" in spelling:
        opening = "{{ " + json.dumps(spelling["start"]) + " }}"
    if chat.template is not None:
        template = chat.template
        turn_end, system_end, thought_start = (text.replace("\n", "\\n") for text in (
            template.TURN_END, template.SYSTEM_END, template.OPENING))
        text = "" if template.default_system is None else f"{space}{template.default_system}{system_end}"
        opening = "{%- if messages[0]['role'] != 'system' %}{{ '<_system>" + text + "' }}{%- endif %}"
        system = "{%- elif message['role'] == 'system' %}{{ '<_system>'" + content + f" + '{system_end}'" + " }}"
        end += f" + '{space}{turn_end}'" if turn_end else ""
        if template.think is not None:
            thought = f" + '<think>{space}{thought_start}'" if thought_start else " + '<think>'"
        if template.CLOSES_THOUGHT:
            answer += " + '</think>'"
    return (opening + "{%- for message in messages %}{%- if message['role'] == 'user' %}{{ " + user + content
            + " }}{%- elif message['role'] == 'assistant' %}{{ " + answer + content + " + " + end + " }}" + system
            + "{%- endif %}{%- endfor %}{%- if add_generation_prompt %}{{ " + bot + thought + " }}{%- endif %}")
