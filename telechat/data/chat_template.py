"""How TeleChat2 and TeleChat3 write a conversation: system text, turns, thoughts, tools and their results.

One description a generation; preprocessing, chat and server all take it from here. A conversation becomes a list
of parts, each a control token or a text that is tokenised on its own, so that no text can turn into a control token.

The texts are those of the publishers' chat templates (TeleChat2: research/telechat2/run_telechat_predict.py of its
repository; TeleChat3: the rules that ms-swift's template of that name states).
"""

import dataclasses
import json
import re
from typing import Optional

from telechat.errors import InputError

_TELECHAT2_SYSTEM = ("你是中国电信星辰语义大模型，英文名是TeleChat，你是由中电信人工智能科技有限公司和中国电信人工智能研究院"
                     "（TeleAI）研发的人工智能助手。")
_TOOLS_BEFORE = "\n\n# 可用工具\n你可以调用<tools></tools>标签中包含的一个或多个工具来辅助你回答问题,以下是可用工具详情：\n<tools>\n"
_TOOLS_BEHIND = ("\n</tools>\n\n# 调用方法\n你需要遵循工具的要求，使用json格式返回工具名称及参数，并用<tool_call></tool_call>包含。"
                 "下方是一个调用模板：\n<tool_call>\n{\"name\": <function-name>, \"arguments\": <args-json-object>}\n"
                 "</tool_call>\n\n")
# Spelling → the piece that stands in its place in a tokenizer.model whose control pieces have no names yet.
_TOOL_TOKENS = {"<tool_call>": "<_control1>", "</tool_call>": "<_control2>", "<tool_response>": "<_control3>",
                "</tool_response>": "<_control4>"}
_THINK, _END_OF_THOUGHT = "<think>", "</think>"


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

    @classmethod
    def for_tokenizer(cls, tokenizer):
        """The template of the model that a tokenizer belongs to; None for TeleChat-1, which has none.

        TeleChat2's and 3's tokenizers have an <_observation>, which 1's have not; only 3's has pieces for thoughts.
        Names that its tokenizer_config.json gives to tokens go before the pieces' own.

        Raises:
            InputError: it lacks a token of its generation.
        """
        if tokenizer.token_to_id("<_observation>") is None:
            return None
        thinks = tokenizer.token_to_id(_THINK) is not None

        def find(*names):
            found = [index for index in map(tokenizer.token_to_id, names) if index is not None]
            if not found:
                raise InputError(f"{tokenizer.path} has no token {names[0]}; give the tokenizer that was published with "
                                 "the model")
            return found[0]

        tools = {name: find(name, piece) if not thinks else find(name) for name, piece in _TOOL_TOKENS.items()}
        if thinks:
            return cls(find("<_system>"), tools, find(_THINK), find(_END_OF_THOUGHT))
        return cls(find("<_system>"), tools, default_system=_TELECHAT2_SYSTEM)

    @property
    def marks(self):
        """The ids that an answer may hold besides text, a frozenset."""
        return frozenset(self.tool_tokens.values()) | ({self.think, self.end_of_thought} - {None})

    def spelling(self, token):
        """How one of `marks` is written in a text."""
        names = {self.think: _THINK, self.end_of_thought: _END_OF_THOUGHT}
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
            last = learning and number == len(messages) - 1
            parts += self._message(chat_format, message, messages[number - 1] if number else None, last)
            if message["role"] != "bot":
                continue
            parts += [Part(chat_format.end, True), Part("\n")]
        if prompt:
            parts.append(Part(chat_format.bot))
            if self.think is not None:
                parts += [Part(self.think), Part("\n")]
                if not thinking:
                    parts += [Part(self.end_of_thought), Part("\n")]
        return _joined(parts)

    def _system_text(self, system, tools):
        text = system or ""
        if tools:
            listed = "\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools)
            return f"{text}{_TOOLS_BEFORE}{listed}{_TOOLS_BEHIND}"
        return text if system is None else text + "\n"

    def _message(self, chat_format, message, before, keep_thought):
        role, content = message["role"], message["content"]
        if role == "user":
            return [Part(chat_format.user), Part(content)]
        if role == "tool":
            opening = [Part("\n")] if before is not None and before["role"] == "tool" else [Part(chat_format.user)]
            return [*opening, Part(self.tool_tokens["<tool_response>"]), Part(f"\n{content}\n"),
                    Part(self.tool_tokens["</tool_response>"])]
        if role != "bot":
            raise InputError(f'a message\'s role must be "system" (the first alone), "user", "bot" or "tool", not {role!r}')
        parts = [Part(chat_format.bot), *(Part(part, True) for part in self._answer(content, keep_thought))]
        for number, call in enumerate(message.get("tool_calls") or ()):
            if number:
                parts.append(Part("\n", True))
            written = json.dumps({"name": call["name"], "arguments": call["arguments"]}, ensure_ascii=False)
            parts += [Part(self.tool_tokens["<tool_call>"], True), Part(f"\n{written}\n", True),
                      Part(self.tool_tokens["</tool_call>"], True)]
        return parts

    def _answer(self, content, keep_thought):
        """What an answer is written as: without its thought, or with it in the model's own tokens."""
        if self.think is None or _END_OF_THOUGHT not in content:
            return [content]
        thought, answer = content.rsplit(_END_OF_THOUGHT, 1)
        if not keep_thought:
            return [answer.lstrip("\n")]
        return [self.think, thought.removeprefix(_THINK), self.end_of_thought, answer]

    def _marked(self, text):
        """Parts of a text of the template's own, in which the tools' tokens are tokens."""
        pattern = "(" + "|".join(map(re.escape, self.tool_tokens)) + ")"
        return [Part(self.tool_tokens.get(stretch, stretch)) for stretch in re.split(pattern, text)]


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
