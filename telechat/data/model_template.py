"""Which chat template the model of a tokenizer has, and whether tokenizer and model belong together."""

import os

from telechat.config import TeleChatConfig
from telechat.data.chat_template import END_OF_THOUGHT, TELECHAT2_SYSTEM, THINK, ChatTemplate
from telechat.data.coder_template import PARAMETER_MARKS, CoderTemplate
from telechat.errors import InputError

# Spelling → the piece that stands in its place in a tokenizer.model whose control pieces have no names yet.
_TOOL_TOKENS = {"<tool_call>": "<_control1>", "</tool_call>": "<_control2>", "<tool_response>": "<_control3>",
                "</tool_response>": "<_control4>"}
_BELONGS = "give the tokenizer that was published with the model"


def template_for(tokenizer):
    """The template of the model that a tokenizer belongs to; None for TeleChat-1, which has none.

    TeleChat2's and 3's tokenizers have an <_observation>, which 1's have not; only 3's has pieces for thoughts. The
    Coder's folder has a chat template that writes <param_key>, or such a token. Names that tokenizer_config.json gives
    to tokens go before the pieces' own.

    Raises:
        InputError: it lacks a token of its generation.
    """
    observation = tokenizer.token_to_id("<_observation>")
    if observation is None:
        return None

    def find(*names):
        found = [index for index in map(tokenizer.token_to_id, names) if index is not None]
        if not found:
            raise InputError(f"{tokenizer.path} has no token {names[0]}; {_BELONGS}")
        return found[0]

    system = find("<_system>")
    if not thinks(tokenizer):
        tools = {name: find(name, piece) for name, piece in _TOOL_TOKENS.items()}
        return ChatTemplate(system, tools, default_system=TELECHAT2_SYSTEM)
    tools = {name: find(name) for name in _TOOL_TOKENS}
    thoughts = find(THINK), find(END_OF_THOUGHT)
    parameters = {name: index for name in PARAMETER_MARKS if (index := tokenizer.token_to_id(name)) is not None}
    if parameters or PARAMETER_MARKS[0] in tokenizer.chat_template:
        return CoderTemplate(system, tools, *thoughts, observation=observation, parameter_tokens=parameters)
    return ChatTemplate(system, tools, *thoughts)


def thinks(tokenizer):
    """Whether a tokenizer has a token that opens a thought, as TeleChat3's has."""
    return tokenizer.token_to_id(THINK) is not None


def check_generation(tokenizer, config):
    """Refuse the tokenizer of TeleChat2 beside a model of TeleChat3, and the other way about.

    They share all text, and differ in tokens 9 to 14: calls of tools in one, thoughts in the other. A tokenizer of
    TeleChat-1's kind, which has neither, may be anybody's own.

    Args:
        tokenizer (Tokenizer), config (TeleChatConfig): of one model, or said to be.

    Raises:
        InputError: they are of two generations.
    """
    if tokenizer.token_to_id("<_observation>") is None or thinks(tokenizer) == (config.style == "llama"):
        return
    found, model = ("TeleChat3", "TeleChat-1 or TeleChat2") if thinks(tokenizer) else ("TeleChat2", "TeleChat3")
    raise InputError(f"{tokenizer.path} is the tokenizer of {found}, and config.json describes a model of {model}, whose "
                     f"control tokens 9 to 14 mean something else; {_BELONGS}")


def check_folder(tokenizer):
    """`check_generation` for a tokenizer that lies beside a model's config.json, if it does.

    A config.json that does not describe a TeleChat model says nothing about the tokenizer.
    """
    try:
        config = TeleChatConfig.from_pretrained(os.path.join(os.path.dirname(tokenizer.path), "config.json"))
    except InputError:
        return
    check_generation(tokenizer, config)
