"""What a checkpoint directory says about generation: its tokenizer, format and defaults."""

import dataclasses
import os
import sys

from telechat import fields
from telechat.data.conversation import ChatFormat
from telechat.data.model_template import check_generation
from telechat.data.tokenizer import Tokenizer
from telechat.errors import InputError
from telechat.text_files import read_json_object


@dataclasses.dataclass(frozen=True)
class GenerationSettings:
    """Read from a checkpoint directory by `load`.

    ``sampling`` holds defaults for `SamplingParams`; ``max_length`` the longest sequence;
    ``stop_ids`` the tokens that end an answer; ``excluded_ids`` those that the model has a row for, but the
    tokenizer no piece; ``max_new_tokens`` the longest answer where nobody asks for another, None for no limit.
    """

    tokenizer: Tokenizer
    chat_format: ChatFormat
    sampling: dict
    max_length: int
    stop_ids: tuple
    excluded_ids: tuple = ()
    max_new_tokens: int = None

    def longest_answer(self, max_length):
        """Tokens of an answer at most where nobody asks for another number, of a sequence of ``max_length`` tokens."""
        return min(self.max_new_tokens or max_length, max_length)

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
        check_generation(tokenizer, config)
        read = read_generation_config(os.path.join(directory, "generation_config.json"))
        chat_format = ChatFormat.for_tokenizer(tokenizer)
        for name in ("user", "bot"):
            if read[f"{name}_token_id"] in tokenizer.control_ids:
                chat_format = dataclasses.replace(chat_format, **{name: read[f"{name}_token_id"]})
        stop_ids = {chat_format.end, *(index for index in read["eos_token_id"] if 0 <= index < tokenizer.vocab_size)}
        # The published files set a temperature but do not sample: greedy unless do_sample is true.
        sampling = {name: read[name] for name in ("top_k", "top_p", "repetition_penalty")}
        sampling["temperature"] = read["temperature"] if read["do_sample"] else 0.0
        max_length = min(read["max_length"], config.training_seqlen)
        return cls(tokenizer, chat_format, sampling, max_length, tuple(sorted(stop_ids)),
                   tokenizer.missing_ids(config.vocab_size), read["max_new_tokens"])


# What is read of generation_config.json: field → function, bounds, and what it is where it is absent or null.
_FIELDS = {
    "do_sample": (fields.flag, {"default": False}),
    "temperature": (fields.real_number, {"least": 0, "default": 1.0}),
    "top_k": (fields.whole_number, {"default": 0}),
    "top_p": (fields.real_number, {"above": 0, "most": 1, "default": 1.0}),
    "repetition_penalty": (fields.real_number, {"above": 0, "default": 1.0}),
    "max_length": (fields.whole_number, {"least": 1, "default": 2048}),
    "max_new_tokens": (fields.whole_number, {"least": 1, "default": None}),
    "eos_token_id": (fields.token_ids, {"default": ()}),
    "user_token_id": (fields.token_id, {"default": None}),
    "bot_token_id": (fields.token_id, {"default": None}),
}

# Fields by which transformers would answer otherwise, and the values by which it would not.
_WITHOUT_EFFECT = {
    "num_beams": (1,), "penalty_alpha": (0,), "no_repeat_ngram_size": (0,), "encoder_no_repeat_ngram_size": (0,),
    "encoder_repetition_penalty": (1,), "min_length": (0,), "min_new_tokens": (0,), "min_p": (0,), "typical_p": (1,),
    "epsilon_cutoff": (0,), "eta_cutoff": (0,), "bad_words_ids": ([],), "suppress_tokens": ([],), "begin_suppress_tokens": ([],),
    "forced_bos_token_id": (), "forced_eos_token_id": (), "sequence_bias": ({},), "guidance_scale": (1,), "stop_strings": ([],),
}


def read_generation_config(path):
    """The fields of ``generation_config.json`` that count here, with their defaults where the file is absent.

    Other fields, of which transformers writes many, are passed over; a line on stderr names those by which it would
    answer otherwise.

    Returns:
        dict: do_sample (bool), temperature, top_p and repetition_penalty (float), top_k and max_length (int), max_new_tokens (int or None),
        eos_token_id (tuple of int), user_token_id and bot_token_id (int or None).

    Raises:
        InputError: the file is broken, or a field is of the wrong type or out of bounds; both are named.
    """
    values = read_json_object(path, "mend it or remove it") if os.path.lexists(path) else {}
    try:
        read = {name: read(name, values.get(name), **bounds) for name, (read, bounds) in _FIELDS.items()}
    except InputError as error:
        raise InputError(f"{path}: {error}; mend it or remove it") from None
    unused = [name for name, plain in _WITHOUT_EFFECT.items() if values.get(name) is not None and values[name] not in plain]
    if unused:
        print(f"{path}: {', '.join(unused)} not supported; answers are made without", file=sys.stderr, flush=True)
    return read
