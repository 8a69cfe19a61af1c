"""The SentencePiece side of `telechat.data.Tokenizer`: 12B and 52B, ``tokenizer.model``."""

import codecs
import functools
import re

import sentencepiece

from telechat.data.sentencepiece_bytes import made_control, user_defined, without_dummy_prefix
from telechat.errors import InputError

_SPACE = "▁"  # U+2581, how SentencePiece spells a space

# The official tokenizers cut the text at their special tokens before SentencePiece sees it. Those
# that tokenizer_config.json calls single_word are cut at only between spaces: these of 12B, whose unknown
# token is <_end>, so that <_unk> is no special token, while 52B's <unk> is one.
_RULES = dict.fromkeys(("<_end>", "<_pad>"), frozenset({"single_word"}))
_UNKNOWN_THAT_SPLITS = "<unk>"

# SentencePiece replaces each byte that is no UTF-8 by one U+FFFD.
BYTE_ERRORS = "telechat-each-byte"
codecs.register_error(BYTE_ERRORS, lambda error: ("\ufffd" * (error.end - error.start), error.end))


class SentencePieceModel:
    """One SentencePiece BPE model with byte fallback.

    Args:
        data: the content of ``tokenizer.model``.
        name: what error messages call the file.
        registered (dict): spellings of the control and user-defined pieces that a text is cut at, and what is true of
            each: "single_word", "lstrip", "rstrip"; None: all control pieces, by the rules of 12B.
    """

    has_leading_space = True  # the first token's space is dropped in decoding
    byte_errors = BYTE_ERRORS

    def __init__(self, data, name, registered=None):
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=data)
            self.size = self._processor.get_piece_size()
            positions = user_defined(data)
            self._processor.id_to_piece(list(range(self.size)))  # all are text
        except (RuntimeError, ValueError):
            raise InputError(f"{name} is not a whole SentencePiece model; give the published "
                             "tokenizer.model, or a tokenizer.json") from None
        if not self.size:
            raise InputError(f"{name} holds no vocabulary; give the published tokenizer.model")
        unknown = self.find(_UNKNOWN_THAT_SPLITS)
        markers = [index for index in positions if _is_marker(self._processor.id_to_piece(index))]
        self._split_ids = frozenset(
            index for index, is_control in enumerate(self._processor.is_control(list(range(self.size))))
            if is_control or index == unknown).union(
                index for index in markers if registered and self._processor.id_to_piece(index) in registered)
        self.control_ids = self._split_ids | {self._processor.unk_id()} | set(markers)
        # A control piece takes no part in segmentation, exactly as if it were not there.
        self._without_markers = made_control(data, map(positions.get, markers))
        spellings = sorted((spelling for spelling in map(self._processor.id_to_piece, self._split_ids)
                            if registered is None or spelling in registered), key=len, reverse=True)
        self._spellings = frozenset(spellings)
        self._split = re.compile("(" + "|".join(map(re.escape, spellings)) + ")") if spellings else None
        rules = _RULES if registered is None else registered
        self._rules = {spelling: rules[spelling] for spelling in spellings if rules.get(spelling)}

    def find(self, token):
        """The id of a piece, or None where there is no such piece."""
        index = self._processor.piece_to_id(token)  # the unknown id for what it does not know
        return index if self._processor.id_to_piece(index) == token else None

    def spelling(self, index):
        """The piece of an id below `size`."""
        return self._processor.id_to_piece(index)

    def encode(self, text):
        """Ids as the official tokenizer gives them: control tokens in the text are control tokens."""
        ids = []
        for stretch in self._stretches(text):
            index = self._processor.piece_to_id(stretch)
            if stretch in self._spellings:
                ids.append(index)
            else:
                ids.extend(self._processor.encode(stretch))
        return ids

    def _stretches(self, text):
        """Cut ``text`` at special tokens, by the rule of transformers' slow tokenizers.

        A single-word token with something other than a space beside it stays glued to that
        neighbour, and is then text; others may take the white space beside them away. The walk changes the
        neighbours as it goes, so the outcome for runs of tokens depends on the order; it is the official one.
        """
        parts = [part for part in self._split.split(text) if part] if self._split else [text]
        for index, part in enumerate(parts):
            rules = self._rules.get(part)
            if not rules:
                continue
            left = parts[index - 1] if index else ""
            right = parts[index + 1] if index + 1 < len(parts) else ""
            if right and "rstrip" in rules:
                parts[index + 1] = right.lstrip()
            if left and "lstrip" in rules:
                parts[index - 1] = left.rstrip()
            if "single_word" not in rules:
                continue
            if left and not left.endswith(" "):
                parts[index - 1], parts[index] = parts[index - 1] + part, ""
            elif right and not right.startswith(" "):
                parts[index + 1], parts[index] = part + parts[index + 1], ""
        return [part for part in parts if part]

    def encode_text(self, text):
        """Ids in which no control token appears, whatever the text says."""
        return self._text_processor.encode(text)

    def encode_texts(self, texts, threads):
        """`encode_text` of each, a list of int32 arrays."""
        return self._text_processor.encode(texts, num_threads=threads, return_type="numpy")

    def encode_continuation(self, text):
        """`encode_text` of what follows a control token: without the dummy prefix (leading space)."""
        return self._continuation_processor.encode(text)

    @functools.cached_property
    def _text_processor(self):
        return sentencepiece.SentencePieceProcessor(model_proto=self._without_markers)

    @functools.cached_property
    def _continuation_processor(self):
        return sentencepiece.SentencePieceProcessor(model_proto=without_dummy_prefix(self._without_markers))

    def decode(self, ids):
        """SentencePiece's own decoding; control tokens, which it drops, are spelt out.

        As in the official code, each stretch between control tokens is decoded on its own.
        """
        text, stretch = [], []
        for index in ids:
            if index in self._split_ids:
                text += self._processor.decode(stretch), self._processor.id_to_piece(index)
                stretch = []
            else:
                stretch.append(index)
        return "".join(text) + self._processor.decode(stretch)

    def starts_stretch(self, index):
        """Whether the token after ``index`` is decoded as if it were the first."""
        return index in self._split_ids

    def is_byte(self, index):
        """Whether the token stands for one byte, which may be a part of a character."""
        return self._processor.is_byte(index)

    def token_bytes(self, index):
        """The UTF-8 bytes of a token that is not the first."""
        piece = self._processor.id_to_piece(index)
        if self._processor.is_byte(index):
            return bytes([int(piece[3:5], 16)])  # "<0xE4>"
        if index in self._split_ids:
            return piece.encode()
        if self._processor.is_unknown(index):
            return self._processor.decode([index]).encode()
        return piece.replace(_SPACE, " ").encode()


def _is_marker(piece):
    """Whether the spelling of a user-defined piece is one like <_user> or <reserve1>, not a digit or an emoji."""
    return piece.startswith("<") and piece.endswith(">")
