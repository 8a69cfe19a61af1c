"""From logits to the next token."""

import dataclasses
import math
import typing

import numpy as np

from telechat.errors import InputError


@dataclasses.dataclass(frozen=True)
class SamplingParams:
    """How the next token is chosen.

    Args:
        max_new_tokens (int): the most tokens to generate.
        temperature (float): divides the logits; 0 takes the most likely token (greedy).
        top_k (int): only the k most likely tokens stay; 0 is off.
        top_p (float): only the most likely tokens that together reach this probability stay.
        repetition_penalty (float): of tokens already in the sequence, prompt included, as in CTRL
            (arXiv:1909.05858): positive logits are divided by it, negative ones multiplied.
        presence_penalty (float): subtracted from the logits of tokens that the answer already holds.
        frequency_penalty (float): the same, times how often the answer holds them.
        stop_ids (tuple of int): generation ends at any of these, which is left out of the result.
        seed (int): of the random draws; None draws a fresh one.
        excluded_ids (tuple of int): never drawn; `GenerationSettings.excluded_ids` are those without a piece.
        logprobs (int): with each token come its log-probability and those of so many of the likeliest tokens;
            None for none.

    Raises:
        InputError: a value is out of range.
    """

    max_new_tokens: int
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    stop_ids: tuple = ()
    seed: int = None
    excluded_ids: tuple = ()
    logprobs: int = None

    def __post_init__(self):
        for name in ("stop_ids", "excluded_ids"):
            object.__setattr__(self, name, tuple(int(token) for token in getattr(self, name)))
        self._whole("max_new_tokens", 1)
        self._whole("top_k", 0)
        for name in ("seed", "logprobs"):
            if getattr(self, name) is not None:
                self._whole(name, 0)
        self._number("temperature", lambda x: x >= 0, "at least 0")
        self._number("top_p", lambda x: 0 < x <= 1, "above 0 and at most 1")
        self._number("repetition_penalty", lambda x: x > 0, "above 0")
        for name in ("presence_penalty", "frequency_penalty"):
            self._number(name, lambda x: -2 <= x <= 2, "from -2 to 2")

    def _whole(self, name, least):
        value = getattr(self, name)
        if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < least:
            raise InputError(f"{name} must be a whole number of at least {least}, not {value!r}")

    def _number(self, name, holds, bounds):
        value = getattr(self, name)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value) \
                or not holds(value):
            raise InputError(f"{name} must be a number {bounds}, not {value!r}")


def without(logits, ids):
    """Logits (V,) with −∞ for ``ids``; the input is left alone."""
    if not len(ids):
        return logits
    logits = logits.copy()
    logits[np.asarray(ids, np.int64)] = -np.inf
    return logits


def penalised(logits, previous_ids, penalty):
    """Logits (V,) after the repetition penalty for ``previous_ids``; the input is left alone."""
    if penalty == 1.0:
        return logits
    seen = np.unique(np.asarray(previous_ids, np.int64))
    logits = logits.copy()
    values = logits[seen]
    logits[seen] = np.where(values > 0, values / penalty, values * penalty)
    return logits


def counted_penalty(logits, answer_ids, presence, frequency):
    """Logits (V,) less ``presence`` and count × ``frequency`` for each of ``answer_ids``; the input is left alone.

    The presence and frequency penalties of OpenAI's interface; unlike the repetition penalty they look
    at the answer alone.
    """
    if not len(answer_ids) or presence == frequency == 0:
        return logits
    seen, counts = np.unique(np.asarray(answer_ids, np.int64), return_counts=True)
    logits = logits.copy()
    logits[seen] -= (presence + frequency * counts).astype(logits.dtype)
    return logits


def distribution(logits, previous_ids, params, prompt_length=0):
    """The probabilities that a token is drawn from.

    In the order of the official code (transformers' processors): repetition penalty, temperature,
    top-k, top-p; presence and frequency penalties come after the repetition penalty. Temperature 0
    puts everything on the most likely token. Excluded ids are out before anything else.

    Args:
        logits (array): float32 (V,).
        previous_ids (sequence of int): the tokens so far, prompt included.
        params (SamplingParams): the settings.
        prompt_length (int): how many of ``previous_ids`` are the prompt's.

    Returns:
        (array, array): the ids that can be drawn, most likely first, and their float64 probabilities.

    Raises:
        FloatingPointError: the logits are not finite, so that there is nothing to choose by.
    """
    logits = np.asarray(logits)
    if not np.isfinite(logits).all():
        raise FloatingPointError("the model's logits are not finite numbers; check its weights, or load it in float32")
    logits = penalised(without(logits, params.excluded_ids), previous_ids, params.repetition_penalty)
    logits = counted_penalty(logits, previous_ids[prompt_length:], params.presence_penalty, params.frequency_penalty)
    if params.temperature == 0:
        return np.array([logits.argmax()]), np.ones(1)
    if 0 < params.top_k < len(logits):
        # Everything tied with the k-th value stays.
        threshold = np.partition(logits, -params.top_k)[-params.top_k]
        ids = np.flatnonzero((logits >= threshold) & (logits > -np.inf))
    else:
        ids = np.flatnonzero(logits > -np.inf)
    ids = ids[np.argsort(-logits[ids], kind="stable")]
    with np.errstate(over="ignore"):  # a temperature close to 0 may bring all but the first to -inf
        scaled = (logits[ids].astype(np.float64) - logits[ids[0]]) / params.temperature
    probabilities = np.exp(scaled)
    probabilities /= probabilities.sum()
    if params.top_p < 1:
        # A token stays while those before it have not reached top_p; the first always does.
        reached = np.cumsum(probabilities) - probabilities
        keep = max(int(np.searchsorted(reached, params.top_p)), 1)
        ids, probabilities = ids[:keep], probabilities[:keep] / probabilities[:keep].sum()
    return ids, probabilities


class TokenLogprobs(typing.NamedTuple):
    """How likely a token was, by the logits as the model gave them."""

    token: int
    logprob: float
    top: list  # (token, logprob) of the likeliest ones, most likely first


def token_logprobs(logits, token, count, excluded_ids=()):
    """Log-probabilities of a token that was drawn and of the ``count`` likeliest ones that may be.

    The softmax is that of all logits (V,), before penalties and temperature, computed in float64.

    Returns:
        TokenLogprobs
    """
    shifted = np.asarray(logits, np.float64)
    shifted = shifted - shifted.max()
    logprobs = shifted - np.log(np.exp(shifted).sum())
    ranked = without(logprobs, excluded_ids)
    count = min(count, len(ranked))
    likeliest = np.argpartition(-ranked, count - 1)[:count] if count else np.zeros(0, np.int64)
    likeliest = sorted(likeliest.tolist(), key=lambda index: (-ranked[index], index))
    return TokenLogprobs(token, float(logprobs[token]),
                         [(index, float(logprobs[index])) for index in likeliest if ranked[index] > -np.inf])


class Sampler:
    """Draws the tokens of one sequence.

    Args:
        params (SamplingParams): the settings.
        index (int): place of the prompt in its call, so that equal prompts get different draws.
        prompt_length (int): how many of the sequence's ids are the prompt's.
    """

    def __init__(self, params, index=0, prompt_length=0):
        self.params = params
        self.prompt_length = prompt_length
        self._random = np.random.default_rng(None if params.seed is None else [params.seed, index])

    def __call__(self, logits, previous_ids):
        """The next token's id for float32 ``logits`` (V,)."""
        ids, probabilities = distribution(logits, previous_ids, self.params, self.prompt_length)
        if len(ids) == 1:
            return int(ids[0])
        point = self._random.random() * probabilities.sum()
        return int(ids[min(np.searchsorted(np.cumsum(probabilities), point, side="right"), len(ids) - 1)])
