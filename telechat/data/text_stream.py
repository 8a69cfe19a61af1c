"""The text of an answer, printed while it is generated."""

import codecs


class TextStream:
    """Text of an answer while its tokens arrive.

    What `put` and `end` return, joined, is ``tokenizer.decode(ids, skip_control_tokens)``. A
    character is returned when its last byte has come, never half of it; the cost of a token does
    not depend on how many went before.
    """

    def __init__(self, tokenizer, skip_control_tokens=True):
        self._tokenizer = tokenizer
        self._model = tokenizer._model
        self._skipped = tokenizer.control_ids if skip_control_tokens else frozenset()
        self._decoder = codecs.getincrementaldecoder("utf-8")(self._model.byte_errors)
        # Tokens from which no text has come yet: the next one is still the first of its stretch.
        self._first = [] if self._model.has_leading_space else None

    @property
    def drops_space(self):
        """Whether the next token is the first of its stretch, whose leading space is no part of the text."""
        return self._first is not None

    def put(self, token_id):
        """Take one token id; return the text that is final now, possibly ""."""
        token_id = self._tokenizer._check_id(token_id)
        if token_id in self._skipped:
            return ""
        if self._model.starts_stretch(token_id):
            self._first = []
            return self._decoder.decode(self._model.token_bytes(token_id))
        if self._first is None or self._model.is_byte(token_id):
            self._first = None
            return self._decoder.decode(self._model.token_bytes(token_id))
        self._first.append(token_id)
        text = self._model.decode(self._first)
        if text:
            self._first = None
        # What a byte token before a control token left unfinished is settled by any text.
        return self._decoder.decode(text.encode())

    def end(self):
        """Return what was held back: half a character, as U+FFFD."""
        return self._decoder.decode(b"", final=True)
