"""How TeleChat2 and TeleChat3 write a conversation: system text, turns, thoughts, tools and their results.

One description a generation; preprocessing, chat and server all take it from here. A conversation becomes a list
of parts, each a control token or a text that is tokenised on its own, so that what users write cannot turn into a control
token. A system text and tools' definitions are the operator's: the tools' tokens that they spell are tokens, as officially.

The texts are those of the publishers' chat templates (TeleChat2: research/telechat2/run_telechat_predict.py of its
repository; TeleChat3: the rules that ms-swift's template of that name states). What TeleChat3-Coder writes otherwise
is in coder_template.py; which of them a tokenizer's model has, in model_template.py.
"""

import dataclasses
import json
import re
from typing import Optional

from telechat.errors import InputError

TELECHAT2_SYSTEM = ("你是中国电信星辰语义大模型，英文名是TeleChat，你是由中电信人工智能科技有限公司和中国电信人工智能研究院"
                    "（TeleAI）研发的人工智能助手。")
_TOOLS_BEFORE = "\n\n# 可用工具\n你可以调用<tools></tools>标签中包含的一个或多个工具来辅助你回答问题,以下是可用工具详情：\n<tools>\n"
_TOOLS_BEHIND = ("\n</tools>\n\n# 调用方法\n你需要遵循工具的要求，使用json格式返回工具名称及参数，并用<tool_call></tool_call>包含。"
                 "下方是一个调用模板：\n<tool_call>\n{\"name\": <function-name>, \"arguments\": <args-json-object>}\n"
                 "</tool_call>\n\n")
THINK, END_OF_THOUGHT = "<think>", "</think>"


@dataclasses.dataclass(frozen=True)
class Part:
    """A control token (int) or a text (str) of a conversation, and whether the loss counts it."""

    content: object
    learnt: bool = False


@dataclasses.dataclass(frozen=True)
class ChatTemplate:
    """The format of TeleChat2 or TeleChat3.

    Attributes:
        system: id of the token in front of the system text.
        tool_tokens: spelling → id of the four tokens around calls and results.
        think, end_of_thought: ids, or None where the model does not think.
        default_system: the system text where a conversation has none; None for nothing.
    """

    system: int
    tool_tokens: dict = dataclasses.field(hash=False)
    think: Optional[int] = None
    end_of_thought: Optional[int] = None
    default_system: Optional[str] = None

    TURN_END = SYSTEM_END = "\n"  # behind an answer's end token, and behind a system text
    OPENING = "\n"  # behind the token that opens a thought
    CLOSES_THOUGHT = False  # whether an answer without a thought begins with the token that ends one
    FAULT = "a call of a tool was not a JSON object with name and arguments"

    @property
    def marks(self):
        """The ids that an answer may hold besides text, a frozenset."""
        return frozenset(self.tool_tokens.values()) | ({self.think, self.end_of_thought} - {None})

    def spelling(self, token):
        """How one of `marks` is written in a text."""
        names = {self.think: THINK, self.end_of_thought: END_OF_THOUGHT}
        return names[token] if token in names else next(
            name for name, index in self.tool_tokens.items() if index == token)

    def parts(self, chat_format, messages, tools=None, prompt=False, thinking=True, learning=False):
        """The parts of a conversation.

        Args:
            chat_format (ChatFormat): its user, bot and end tokens.
            messages: list of {"role": "system", "user", "bot" or "tool", "content": str}; a bot's may have
                "tool_calls", a list of {"name": str, "arguments": dict}.
            tools: list of tool definitions (OpenAI's form), or None.
            prompt: whether an answer is to follow.
            thinking: whether that answer begins with a thought, where the model thinks.
            learning: whether the last answer's thought stays, to be learnt; other thoughts are left out.

        Returns:
            list of `Part`. Answers count, with their end token; nothing else does.

        Raises:
            InputError: a message is not as described.
        """
        messages = list(messages)
        system = messages.pop(0)["content"] if messages and messages[0]["role"] == "system" else self.default_system
        parts = [Part(self.system), *self._marked(self._system_text(system, tools))]
        for number, message in enumerate(messages):
            role, before = message["role"], messages[number - 1] if number else None
            if role == "user":
                parts += [Part(chat_format.user), Part(message["content"])]
            elif role == "tool":
                parts += self._result(chat_format, message["content"], before is not None and before["role"] == "tool")
            elif role == "bot":
                parts += [Part(chat_format.bot), *self._answer(message["content"], self._keeps_thought(messages, number, learning)),
                          *self._calls(message.get("tool_calls") or ()), Part(chat_format.end, True), Part(self.TURN_END)]
            else:
                raise InputError('a message\'s role must be "system" (the first alone), "user", "bot" or "tool", not '
                                 f"{role!r}")
        if prompt:
            parts += [Part(chat_format.bot), *self._opening(thinking)]
        return _joined(parts)

    def with_spelt_tokens(self, parts):
        """A list of `Part` in which the tools' tokens that its texts spell are tokens."""
        return _joined([piece for part in parts for piece in (
            self._marked(part.content, part.learnt) if isinstance(part.content, str) else [part])])

    def read_call(self, text, tools):
        """A call as the model writes it between its tokens, as {"name": str, "arguments": dict}.

        Args:
            text (str): what is written.
            tools: the definitions that were offered.

        Raises:
            ValueError: it is none.
        """
        try:
            call = json.loads(text)
            name, arguments = call["name"], call.get("arguments", {})
        except (KeyError, TypeError, RecursionError):
            raise ValueError(self.FAULT) from None
        if not isinstance(name, str) or not isinstance(arguments, dict):
            raise ValueError(self.FAULT)
        return {"name": name, "arguments": arguments}

    def _system_text(self, system, tools):
        text = system or ""
        if tools:
            return f"{text}{_TOOLS_BEFORE}{written_tools(tools)}{_TOOLS_BEHIND}"
        return text if system is None else text + self.SYSTEM_END

    def _opening(self, thinking):
        """What stands between the bot token and an answer that is to come."""
        if self.think is None:
            return []
        parts = [Part(self.think), Part(self.OPENING)]
        return parts if thinking else [*parts, Part(self.end_of_thought), Part(self.OPENING)]

    def _keeps_thought(self, messages, number, learning):
        return learning and number == len(messages) - 1

    def _answer(self, content, keep_thought):
        """What an answer is written as: without its thought, or with it in the model's own tokens."""
        if self.think is None or END_OF_THOUGHT not in content:
            return [Part(content, True)]
        thought, answer = content.rsplit(END_OF_THOUGHT, 1)
        if not keep_thought:
            return [Part(answer.lstrip("\n"), True)]
        return [Part(content, True) for content in (self.think, thought.removeprefix(THINK), self.end_of_thought, answer)]

    def _calls(self, calls):
        parts = []
        for number, call in enumerate(calls):
            if number:
                parts.append(Part("\n", True))
            written = json.dumps({"name": call["name"], "arguments": call["arguments"]}, ensure_ascii=False)
            parts += [Part(self.tool_tokens["<tool_call>"], True), Part(f"\n{written}\n", True),
                      Part(self.tool_tokens["</tool_call>"], True)]
        return parts

    def _result(self, chat_format, content, follows):
        """A tool's result; ``follows``: whether it comes right behind another one."""
        opening = Part("\n") if follows else Part(chat_format.user)
        return [opening, Part(self.tool_tokens["<tool_response>"]), Part(f"\n{content}\n"),
                Part(self.tool_tokens["</tool_response>"])]

    def _marked(self, text, learnt=False):
        """Parts of a text in which the tools' tokens are tokens."""
        pattern = "(" + "|".join(map(re.escape, self.tool_tokens)) + ")"
        return [Part(self.tool_tokens.get(stretch, stretch), learnt) for stretch in re.split(pattern, text)]


def written_tools(tools):
    """Tool definitions as the templates list them, a line each."""
    return "\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools)


def _joined(parts):
    """Texts that follow each other as one, since the model's tokenizer sees them so; empty ones left out.

    The text of an answer is one that counts, and keeps apart from what does not.
    """
    joined = []
    for part in parts:
        if part.content == "":
            continue
        if joined and isinstance(part.content, str) and isinstance(joined[-1].content, str) \
                and joined[-1].learnt == part.learnt:
            joined[-1] = Part(joined[-1].content + part.content, part.learnt)
        else:
            joined.append(part)
    return joined
