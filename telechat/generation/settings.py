"""What a checkpoint directory says about generation: its tokenizer, format and defaults."""

import dataclasses
import json
import os

from telechat.data.conversation import ChatFormat
from telechat.data.tokenizer import Tokenizer
from telechat.errors import InputError


@dataclasses.dataclass(frozen=True)
class GenerationSettings:
    """Read from a checkpoint directory by `load`.

    ``sampling`` holds defaults for `SamplingParams`; ``max_length`` the longest sequence;
    ``stop_ids`` the tokens that end an answer; ``excluded_ids`` those that the model has a row for, but the
    tokenizer no piece.
    """

    tokenizer: Tokenizer
    chat_format: ChatFormat
    sampling: dict
    max_length: int
    stop_ids: tuple
    excluded_ids: tuple = ()

    @classmethod
    def load(cls, directory, config):
        """Read tokenizer and ``generation_config.json`` (which may be absent).

        The file's user and bot ids are taken only where they are control tokens of the tokenizer:
        52B's published file still has those of 12B, which are emoji in its vocabulary.

        Args:
            directory (str): checkpoint directory.
            config (TeleChatConfig): of its model.

        Raises:
            InputError: there is no tokenizer, it does not fit the model, or the file is broken.
        """
        tokenizer = Tokenizer.from_pretrained(directory)
        if tokenizer.vocab_size > config.vocab_size:
            raise InputError(f"the tokenizer in {directory} has {tokenizer.vocab_size} tokens, the model's embedding "
                             f"only {config.vocab_size} rows; use the tokenizer that belongs to the model")
        values = _read(os.path.join(directory, "generation_config.json"))
        chat_format = ChatFormat.for_tokenizer(tokenizer)
        for name, key in (("user", "user_token_id"), ("bot", "bot_token_id")):
            if values.get(key) in tokenizer.control_ids:
                chat_format = dataclasses.replace(chat_format, **{name: values[key]})
        stop_ids = {chat_format.end}
        if values.get("eos_token_id") in tokenizer.control_ids:
            stop_ids.add(values["eos_token_id"])
        # The published files set a temperature but do not sample: greedy unless do_sample is true.
        sampling = {key: values[key] for key in ("top_k", "top_p", "repetition_penalty") if key in values}
        sampling["temperature"] = float(values.get("temperature", 1.0)) if values.get("do_sample") else 0.0
        max_length = min(values.get("max_length", 2048), config.training_seqlen)
        return cls(tokenizer, chat_format, sampling, max_length, tuple(sorted(stop_ids)),
                   tokenizer.missing_ids(config.vocab_size))


def _read(path):
    try:
        with open(path, encoding="utf-8") as file:
            values = json.load(file)
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read ({error}); mend it or remove it") from None
    if not isinstance(values, dict):
        raise InputError(f"{path} must hold a JSON object")
    return values
