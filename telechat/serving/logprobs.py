"""Log-probabilities of tokens in the forms of OpenAI's two interfaces."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class TokenText:
    """A token as clients read it: its spelling, and the bytes that it adds to the text, None where it adds none."""

    text: str
    data: bytes

    @classmethod
    def of(cls, tokenizer, index, first):
        """The token ``index``; ``first``: whether it begins a stretch, whose leading space is no part of the text."""
        if index in tokenizer.control_ids:
            return cls(tokenizer.id_to_token(index), None)
        data = tokenizer.token_bytes(index)
        if first and data.startswith(b" "):
            data = data[1:]
        try:
            return cls(data.decode("utf-8"), data)
        except UnicodeDecodeError:  # a part of a character
            return cls("bytes:" + "".join(f"\\x{byte:02x}" for byte in data), data)


@dataclasses.dataclass(frozen=True)
class TokenChance:
    """One token of an answer with its log-probability and those of the likeliest tokens in its place."""

    token: TokenText
    logprob: float
    top: list  # of (TokenText, log-probability)
    offset: int  # in the answer's text, characters

    @classmethod
    def of(cls, tokenizer, logprobs, first, offset):
        """From `TokenLogprobs`; first as for `TokenText.of`."""
        top = [(TokenText.of(tokenizer, index, first), value) for index, value in logprobs.top]
        return cls(TokenText.of(tokenizer, logprobs.token, first), logprobs.logprob, top, offset)


def chat_logprobs(chances):
    """The field ``logprobs`` of a chat's choice, from a list of `TokenChance`."""
    def entry(token, value):
        return {"token": token.text, "logprob": value, "bytes": None if token.data is None else list(token.data)}

    return {"content": [{**entry(chance.token, chance.logprob), "top_logprobs": [entry(*pair) for pair in chance.top]}
                        for chance in chances], "refusal": None}


def completion_logprobs(chances):
    """The field ``logprobs`` of a completion's choice, from a list of `TokenChance`."""
    return {"tokens": [chance.token.text for chance in chances],
            "token_logprobs": [chance.logprob for chance in chances],
            "top_logprobs": [{token.text: value for token, value in chance.top} for chance in chances],
            "text_offset": [chance.offset for chance in chances]}
