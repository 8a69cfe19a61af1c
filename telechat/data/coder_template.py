"""TeleChat3-Coder's format: as TeleChat3's, but for line breaks, thoughts within a round of tools, calls and results.

The texts are those that the tests of ms-swift's ``telechat3_coder`` template compare with the published chat template.
"""

import dataclasses
import json
import re

from telechat.data.chat_template import END_OF_THOUGHT, THINK, ChatTemplate, Part, written_tools

PARAMETER_MARKS = ("<param_key>", "</param_key>", "<param_value>", "</param_value>")

_TOOLS_BEFORE = ("\n# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
                 "You are provided with function signatures within <tools></tools> XML tags:\n<tools>\n")
_TOOLS_BEHIND = ("\n</tools>\n\nFor each function call, output the function name and arguments within the following XML "
                 "format:\n<tool_call>{function-name}<param_key>{param-key-1}</param_key>"
                 "<param_value>{param-value-1}</param_value><param_key>{param-key-2}</param_key>"
                 "<param_value>{param-value-2}</param_value>...</tool_call>")
_PARAMETER = re.compile(r"<param_key>(.*?)</param_key>\s*<param_value>(.*?)</param_value>\s*", re.DOTALL)
_CALL = re.compile(r"\s*([^\s<>()\[\]{}\"']+)\s*((?:" + _PARAMETER.pattern.replace("(.*?)", ".*?") + ")*)", re.DOTALL)


@dataclasses.dataclass(frozen=True)
class CoderTemplate(ChatTemplate):
    """The format of TeleChat3-Coder.

    No line breaks stand between turns. An answer without a thought begins with </think>. Thoughts behind the last
    question stay, so that the model goes on thinking from one call of a tool to the next; earlier ones are left out. A
    call is a name and parameters between marks, a result has <_observation> in front.

    Attributes:
        observation: id of the token in front of tools' results.
        parameter_tokens: spelling → id of those of `PARAMETER_MARKS` that are tokens; the others are text.
    """

    observation: int = None
    parameter_tokens: dict = dataclasses.field(default_factory=dict, hash=False)

    TURN_END = SYSTEM_END = OPENING = ""
    CLOSES_THOUGHT = True
    FAULT = "a call of a tool was not a name with parameters in <param_key> and <param_value>"

    @property
    def marks(self):
        """As of `ChatTemplate`."""
        return super().marks | frozenset(self.parameter_tokens.values())

    def spelling(self, token):
        """As of `ChatTemplate`."""
        own = {index: name for name, index in self.parameter_tokens.items()}
        return own[token] if token in own else super().spelling(token)

    def read_call(self, text, tools):
        """As of `ChatTemplate`.

        A value is what it is as JSON, or else text; one that the tool's definition calls a string is text always.
        """
        call = _CALL.fullmatch(text)
        if call is None:
            raise ValueError(self.FAULT)
        name, strings = call[1], _string_parameters(tools, call[1])
        arguments = {}
        for key, value in _PARAMETER.findall(call[2]):
            key, value = key.strip(), value.strip()
            arguments[key] = value if key in strings else _decoded(value)
        return {"name": name, "arguments": arguments}

    def _system_text(self, system, tools):
        listed = f"{_TOOLS_BEFORE}{written_tools(tools)}{_TOOLS_BEHIND}" if tools else ""
        return (system or "") + listed

    def _opening(self, thinking):
        return [Part(self.think if thinking else self.end_of_thought)]

    def _keeps_thought(self, messages, number, learning):
        return all(message["role"] != "user" for message in messages[number:])

    def _answer(self, content, keep_thought):
        thought, answer = "", content
        if END_OF_THOUGHT in content:
            before, answer = content.split(END_OF_THOUGHT, 1)[0], content.rsplit(END_OF_THOUGHT, 1)[1]
            thought = before.rsplit(THINK, 1)[-1].strip()
        if keep_thought and thought:
            opening = [Part(self.think, True), Part(f"\n{thought}\n", True), Part(self.end_of_thought, True)]
        else:
            opening = [Part(self.end_of_thought)]
        return [*opening, Part(answer.strip(), True)]

    def _calls(self, calls):
        opened, closed, key_opened, key_closed, value_opened, value_closed = (
            Part(self._token(mark), True) for mark in ("<tool_call>", "</tool_call>", *PARAMETER_MARKS))
        parts = []
        for call in calls:
            parts += [opened, Part(call["name"], True)]
            for key, value in call["arguments"].items():
                text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
                parts += [key_opened, Part(key, True), key_closed, value_opened, Part(text, True), value_closed]
            parts.append(closed)
        return parts

    def _result(self, chat_format, content, follows):
        parts = [Part(self.tool_tokens["<tool_response>"]), Part(content), Part(self.tool_tokens["</tool_response>"])]
        return parts if follows else [Part(self.observation), *parts]

    def _marked(self, text, learnt=False):
        marks = (*self.tool_tokens, *self.parameter_tokens)
        stretches = re.split("(" + "|".join(map(re.escape, marks)) + ")", text)
        return [Part(self._token(stretch), learnt) for stretch in stretches]

    def _token(self, text):
        """The id of a mark that is a token, any other text as it is."""
        return self.tool_tokens.get(text, self.parameter_tokens.get(text, text))


def _string_parameters(tools, name):
    """Names of the parameters that the definition of the tool ``name`` calls strings."""
    for tool in tools or ():
        if tool["function"]["name"] == name:
            properties = tool["function"].get("parameters", {}).get("properties", {})
            return {key for key, schema in properties.items() if isinstance(schema, dict) and schema.get("type") == "string"}
    return set()


def _decoded(text):
    try:
        return None if text == "None" else json.loads(text)
    except (ValueError, RecursionError):
        return text
