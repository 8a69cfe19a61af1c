"""The byte-level BPE side of `telechat.data.Tokenizer`: 7B, ``tokenizer.json``."""

import functools
import json

import numpy as np
import tokenizers

from telechat.errors import InputError
from telechat.text_files import decode


class ByteLevelBPE:
    """One ``tokenizer.json`` of the `tokenizers` library with a byte-level decoder.

    Args:
        data: the content of ``tokenizer.json``.
        name: what error messages call the file.
    """

    has_leading_space = False
    byte_errors = "replace"  # one U+FFFD for each maximal ill-formed part, as Rust does

    def __init__(self, data, name):
        try:
            self._text = decode(data)
            decoder = json.loads(self._text).get("decoder") or {}
            self._tokenizer = tokenizers.Tokenizer.from_str(self._text)
        except Exception:  # the library raises plain Exception; all of it means "not such a file"
            raise InputError(f"{name} is not a whole tokenizer.json; give the published "
                             "tokenizer.json, or a tokenizer.model") from None
        if decoder.get("type") != "ByteLevel":
            raise InputError(f"{name} is not a byte-level BPE (its decoder is not ByteLevel); "
                             "give the tokenizer.json published with TeleChat 7B")
        self.size = 1 + max(self._tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)
        if not self.size:
            raise InputError(f"{name} holds no vocabulary; give the published tokenizer.json")
        self.control_ids = frozenset(index for index, token in
                                     self._tokenizer.get_added_tokens_decoder().items()
                                     if token.special or _is_marker(token.content))

    def find(self, token):
        """The id of a token, or None where there is no such token."""
        return self._tokenizer.token_to_id(token)

    def spelling(self, index):
        """The token of an id below `size`, or None where the numbering has a gap."""
        return self._tokenizer.id_to_token(index)

    def encode(self, text):
        """Ids as the library gives them: added tokens in the text are those tokens."""
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def encode_text(self, text):
        """Ids in which no control token appears, whatever the text says."""
        return self._text_tokenizer.encode(text, add_special_tokens=False).ids

    def encode_texts(self, texts, threads):
        """`encode_text` of each, a list of int32 arrays; the library's threads are as many as processors."""
        if threads == 1:
            ids = map(self.encode_text, texts)
        else:
            ids = (encoded.ids for encoded in self._text_tokenizer.encode_batch(texts, add_special_tokens=False))
        return [np.array(text_ids, np.int32) for text_ids in ids]

    encode_continuation = encode_text  # a byte-level BPE has no dummy prefix

    @functools.cached_property
    def _text_tokenizer(self):
        definition = json.loads(self._text)
        definition["added_tokens"] = [token for token in definition.get("added_tokens", [])
                                      if token["id"] not in self.control_ids]
        return tokenizers.Tokenizer.from_str(json.dumps(definition))

    def decode(self, ids):
        """The library's decoding, control tokens spelt out."""
        return self._tokenizer.decode(ids, skip_special_tokens=False)

    def starts_stretch(self, index):
        """Never: a token is decoded the same wherever it stands."""
        return False

    def is_byte(self, index):
        """Never: what a token stands for is bytes throughout."""
        return False

    def token_bytes(self, index):
        """The bytes of a token, which may begin or end inside a character."""
        token = self._tokenizer.id_to_token(index)
        try:
            return bytes(_BYTE_OF[character] for character in token)
        except KeyError:  # an added token that is spelt in plain text
            return token.encode()


def _is_marker(token):
    return token.startswith("<") and token.endswith(">")


def _byte_alphabet():
    """GPT-2's alphabet: a printable Latin-1 byte stands for itself, the n-th other one is U+0100 + n."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {**{chr(byte): byte for byte in printable},
            **{chr(0x100 + n): byte for n, byte in enumerate(others)}}


_BYTE_OF = _byte_alphabet()
