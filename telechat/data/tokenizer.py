"""Tokenizer: text to ids and back, for the published tokenizers of all three models."""

import hashlib
import json
import os

from telechat.checkpoint.atomic_replacement import replace_atomically
from telechat.data.byte_level_bpe import ByteLevelBPE
from telechat.data.sentencepiece_model import SentencePieceModel
from telechat.errors import InputError
from telechat.foreign import refuse_foreign_directory
from telechat.text_files import read_file

_CONFIG, _TEMPLATE = "tokenizer_config.json", "chat_template.jinja"
_WANTED = "give a tokenizer.model, a tokenizer.json or a directory with one of them"
_FILES = ("tokenizer.model", "tokenizer.json", _CONFIG, _TEMPLATE)


class Tokenizer:
    """A tokenizer of the TeleChat models; make one with `from_pretrained`.

    12B and 52B come with a SentencePiece ``tokenizer.model``, 7B with a byte-level BPE
    ``tokenizer.json``; which of the two it is makes no difference to the callers.

    Attributes:
        file_name: "tokenizer.model" or "tokenizer.json", the name under which `save` writes it.
        path: where it was read from.
        sha256: hexadecimal digest of the file.
    """

    def __init__(self, model, file_name, path, files):
        self._model = model
        self._files = files
        self.file_name = file_name
        self.path = path
        self.sha256 = hashlib.sha256(files[file_name]).hexdigest()
        self._named = added_tokens(files.get(_CONFIG), model.size)

    @classmethod
    def from_pretrained(cls, path):
        """Read a tokenizer from a checkpoint directory or from its file.

        Args:
            path: a directory that holds ``tokenizer.model`` or ``tokenizer.json`` (the first where
                it holds both), or such a file, whatever it is called (a name that ends in ``.json``
                is taken for a ``tokenizer.json``).

        Raises:
            InputError: there is no such file, or it is neither kind of tokenizer.
        """
        path = os.fspath(path)
        if os.path.isdir(path):
            found = [os.path.join(path, name) for name in _FILES[:2]
                     if os.path.isfile(os.path.join(path, name))]
            if not found:
                refuse_foreign_directory(path)
                raise InputError(f"{path} holds neither tokenizer.model nor tokenizer.json; "
                                 "copy the published one there")
            path = found[0]
        is_json = path.endswith(".json")
        data = read_file(path, _WANTED)
        file_name = "tokenizer.json" if is_json else "tokenizer.model"
        files = {file_name: data}
        for name in (_CONFIG, _TEMPLATE):
            beside = os.path.join(os.path.dirname(path), name)
            if os.path.isfile(beside):
                files[name] = read_file(beside, _WANTED)
        registered = registered_tokens(files.get(_CONFIG))
        model = ByteLevelBPE(data, path) if is_json else SentencePieceModel(data, path, registered)
        return cls(model, file_name, path, files)

    @property
    def vocab_size(self):
        """One more than the highest id: all pieces, the added tokens of a tokenizer.json included."""
        return self._model.size

    @property
    def control_ids(self):
        """frozenset of the ids that are not text: <_user>, </s>, <reserve7>, the unknown token, …"""
        return self._model.control_ids

    @property
    def chat_template(self):
        """The publisher's chat template (Jinja) that lies beside the tokenizer, str; "" where there is none.

        It tells models apart, and is not run.
        """
        if _TEMPLATE in self._files:
            return self._files[_TEMPLATE].decode("utf-8", "replace")
        given = _config_values(self._files.get(_CONFIG)).get("chat_template")
        return given if isinstance(given, str) else json.dumps(given or "")

    def missing_ids(self, rows):
        """The ids below ``rows``, the rows of a model's embedding, that no piece has: a tuple of int.

        52B's embedding has 80,896 rows for 80,000 pieces.
        """
        return tuple(index for index in range(rows) if index >= self.vocab_size or self._model.spelling(index) is None)

    def encode(self, text, control_tokens=True):
        """Ids of ``text``, without any token added around it.

        Args:
            text: str.
            control_tokens: True: a control token spelt in the text becomes that token, exactly as
                in the official tokenizers. False: it stays text, and no control id is returned.

        Returns:
            list[int]

        Raises:
            InputError: not a str, or a str that UTF-8 cannot express (half of a surrogate pair).
        """
        _check_text(text)
        return self._model.encode(text) if control_tokens else self._model.encode_text(text)

    def encode_batch(self, texts, threads=1):
        """``encode(text, control_tokens=False)`` of each of a list of texts, by the libraries' own threads.

        Returns a list of int32 arrays: of many texts, making them takes a fraction of the time that lists take.
        SentencePiece takes as many as are given; for a ``tokenizer.json`` more than one means one a processor.
        """
        for text in texts:
            _check_text(text)
        return self._model.encode_texts(texts, threads)

    def encode_continuation(self, text):
        """Ids of ``text`` as it follows a control token in the same string.

        As ``encode(text, control_tokens=False)``, but SentencePiece puts no space in front.
        """
        _check_text(text)
        return self._model.encode_continuation(text)

    def decode(self, ids, skip_control_tokens=False):
        """The text of ``ids``, as SentencePiece (or the tokenizers library) decodes them.

        Args:
            ids: iterable of int.
            skip_control_tokens: leave out `control_ids` instead of spelling them out.

        Raises:
            InputError: an id is negative or not in the vocabulary (52B's embedding has more rows
                than its tokenizer has tokens).
        """
        ids = [self._check_id(index) for index in ids]
        if skip_control_tokens:
            ids = [index for index in ids if index not in self.control_ids]
        return self._model.decode(ids)

    def token_to_id(self, token):
        """The id of one token ("<_user>"), or None when the tokenizer has no such token.

        A name that tokenizer_config.json gives to an id goes before the pieces' own names.
        """
        _check_text(token)
        return self._named[token] if token in self._named else self._model.find(token)

    def id_to_token(self, index):
        """The spelling of one id as it stands in the vocabulary, or InputError out of its range."""
        return self._model.spelling(self._check_id(index))

    def token_bytes(self, index):
        """The UTF-8 bytes that one id stands for behind another one, perhaps half a character; InputError as above."""
        return self._model.token_bytes(self._check_id(index))

    def save(self, directory):
        """Write the tokenizer file, byte for byte, into a directory (made if need be).

        A tokenizer_config.json and a chat_template.jinja that lay beside it are written too. Another tokenizer that the
        directory holds is replaced.

        Raises:
            InputError: the directory cannot be written.
        """
        with replace_atomically(directory, belongs=_FILES.__contains__) as writing:
            for name, data in self._files.items():
                with open(os.path.join(writing, name), "wb") as file:
                    file.write(data)

    def _check_id(self, index):
        index = int(index)
        if not 0 <= index < self.vocab_size or self._model.spelling(index) is None:
            raise InputError(f"token id {index} is not in the vocabulary of {os.path.basename(self.path)}, "
                             f"which ends at {self.vocab_size - 1}")
        return index


def _config_values(data):
    """The content of a tokenizer_config.json, bytes or None; {} where there is none that can be read.

    The file is its publisher's, and passed on as it is: what it says wrongly names nothing.
    """
    try:
        values = json.loads(data.decode("utf-8-sig")) if data else {}
    except ValueError:
        return {}
    return values if isinstance(values, dict) else {}


def added_tokens(data, size):
    """Name → id of ``added_tokens_decoder`` in the bytes of a tokenizer_config.json; only ids below ``size`` count."""
    given = _config_values(data).get("added_tokens_decoder")
    named = {}
    for index, token in (given if isinstance(given, dict) else {}).items():
        name = _spelling(token)
        if name and index.isdecimal() and int(index) < size:
            named[name] = int(index)
    return named


def registered_tokens(data):
    """The tokens that a tokenizer_config.json registers, so that the official tokenizer cuts a text at them.

    TeleChat2's registers three of its control pieces, and spells the others out. Of a token that is there several times
    the first counts, in transformers' order.

    Returns:
        dict: spelling → frozenset of what is true of it: "single_word", "lstrip", "rstrip"; with <_start>, which the
        official class registers itself. None where the file says nothing.
    """
    values = _config_values(data)
    listed = values.get("added_tokens_decoder")
    tokens = list(listed.values()) if isinstance(listed, dict) else []
    tokens += [values.get(f"{name}_token") for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask")]
    more = values.get("additional_special_tokens")
    tokens += more if isinstance(more, list) else []
    found = {}
    for token in tokens:
        spelling = _spelling(token)
        if spelling is not None:
            rules = (name for name in ("single_word", "lstrip", "rstrip") if isinstance(token, dict) and token.get(name) is True)
            found.setdefault(spelling, frozenset(rules))
    return {"<_start>": frozenset(), **found} if found else None


def _spelling(token):
    """A token as a config writes it, a text or an object with its content; None for something else."""
    content = token.get("content") if isinstance(token, dict) else token
    return content if isinstance(content, str) and content else None


def _check_text(text):
    if not isinstance(text, str):
        raise InputError(f"text to tokenise must be a string, not {type(text).__name__}")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InputError(f"the text holds half of a surrogate pair, \\u{ord(text[error.start]):04x}, "
                         f"at character {error.start + 1}; write the whole character") from None
