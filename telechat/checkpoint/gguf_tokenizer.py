"""A model's tokenizer and chat template as keys of a GGUF file, ``tokenizer.ggml.…``."""

import os

import sentencepiece

from telechat.checkpoint.chat_jinja import chat_jinja
from telechat.data.conversation import ChatFormat
from telechat.data.sentencepiece_bytes import is_plain_bpe
from telechat.data.tokenizer import Tokenizer
from telechat.errors import InputError
from telechat.text_files import decode, parse_json, read_file

NO_TOKENIZER = ("The model has no tokenizer beside it, so the file has none: llama.cpp takes token ids alone. Copy the published "
                "tokenizer.model or tokenizer.json into the checkpoint and export again.")
_BLOOM = " ?[^(\\s|[.,!?…。，、।۔،])]+"  # of BloomTokenizerFast, which 7B's is
_WANTED = "give the tokenizer that was published with the model"


def add_tokenizer(writer, gguf, directory, config):
    """Add the tokenizer of a checkpoint directory.

    Args:
        writer (gguf.GGUFWriter): where to.
        gguf: the package.
        directory: of the checkpoint.
        config (TeleChatConfig): the model's. Rows of the embedding beyond the tokenizer get names that no text has.

    Returns:
        bool: whether there is one.

    Raises:
        InputError: llama.cpp has no way to cut texts as it does.
    """
    if not any(os.path.isfile(os.path.join(directory, name)) for name in ("tokenizer.model", "tokenizer.json")):
        writer.add_tokenizer_model("none")
        return False
    tokenizer = Tokenizer.from_pretrained(directory)
    if tokenizer.vocab_size > config.vocab_size:
        raise InputError(f"{tokenizer.path} has {tokenizer.vocab_size} tokens and the model {config.vocab_size} rows; {_WANTED}")
    chat = ChatFormat.for_tokenizer(tokenizer)
    tokens = [f"[unused row {row}]" for row in range(config.vocab_size)]
    types = [gguf.TokenType.UNUSED] * config.vocab_size
    add = _add_sentencepiece if tokenizer.file_name == "tokenizer.model" else _add_byte_level
    add(writer, gguf.TokenType, tokenizer, tokens, types)
    for index in tokenizer.control_ids:
        if types[index] != gguf.TokenType.UNKNOWN:
            types[index] = gguf.TokenType.CONTROL
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_bos_token_id(config.bos_token_id)
    writer.add_eos_token_id(chat.end)
    writer.add_pad_token_id(chat.pad)
    writer.add_add_bos_token(False)
    writer.add_add_eos_token(False)
    spelling = {role: item["token"] for role, item in chat.tokens(tokenizer).items()}
    writer.add_chat_template(chat_jinja(chat, spelling, ""))
    return True


def _add_sentencepiece(writer, kinds, tokenizer, tokens, types):
    """Pieces and scores. llama.cpp merges by them as SentencePiece does, and puts a space behind each control token."""
    data = read_file(tokenizer.path, _WANTED)
    if not is_plain_bpe(data):
        raise InputError(f"{tokenizer.path} is no BPE model that takes texts as they are, behind a leading space, and llama.cpp "
                         f"would cut texts in another way; {_WANTED}")
    processor = sentencepiece.SentencePieceProcessor(model_proto=data)
    scores = [-1e4] * len(tokens)
    for index in range(processor.get_piece_size()):
        tokens[index], scores[index] = processor.id_to_piece(index), processor.get_score(index)
        types[index] = (kinds.UNKNOWN if processor.is_unknown(index) else kinds.BYTE if processor.is_byte(index)
                        # Digits and the like, user-defined: behind a piece that is declared so llama.cpp would put a space,
                        # while one whose score, 0, is the highest is found before all others too.
                        else kinds.NORMAL)
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_scores(scores)
    writer.add_unk_token_id(processor.unk_id())
    writer.add_add_space_prefix(True)


def _add_byte_level(writer, kinds, tokenizer, tokens, types):
    """Tokens and merges of a tokenizer.json."""
    definition = parse_json(decode(read_file(tokenizer.path, _WANTED)))
    model, added = definition["model"], definition.get("added_tokens", [])
    splitting = _splitting(definition.get("pre_tokenizer") or {})
    if definition.get("normalizer") or splitting is None or model.get("type", "BPE") != "BPE" or model.get("byte_fallback"):
        raise InputError(f"{tokenizer.path} cuts texts in a way that llama.cpp has no name for (it takes GPT-2's and "
                         f"BLOOM's); {_WANTED}")
    for token, index in model["vocab"].items():
        tokens[index], types[index] = token, kinds.NORMAL
    for token in added:
        tokens[token["id"]], types[token["id"]] = token["content"], kinds.USER_DEFINED
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(splitting)
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]])


def _splitting(pre):
    """llama.cpp's name of how a tokenizer.json's pre_tokenizer cuts words, or None."""
    steps = pre.get("pretokenizers", []) if pre.get("type") == "Sequence" else [pre]
    if not steps or steps[-1].get("type") != "ByteLevel" or steps[-1].get("add_prefix_space"):
        return None
    by_itself = steps[-1].get("use_regex", True)
    if len(steps) == 1:
        return "gpt-2" if by_itself else None
    bloom = {"type": "Split", "pattern": {"Regex": _BLOOM}, "behavior": "Isolated", "invert": False}
    return "bloom" if len(steps) == 2 and steps[0] == bloom and not by_itself else None
