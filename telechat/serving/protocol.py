"""What a request of OpenAI's interface asks for, checked field by field.

https://platform.openai.com/docs/api-reference/chat and /completions. Fields that would change the
answer and are not supported are refused by name; those that cannot change it are let pass.
"""

import dataclasses
import json
import secrets

from telechat.generation.chat import build_prompt
from telechat.generation.sampling import SamplingParams
from telechat.serving.api_error import APIError, short
from telechat.serving.chat_messages import plain_messages, read_offer, read_thinking, template_messages

MOST_CHOICES = 16
MOST_STOPS = 4
LONGEST_STOP = 256  # characters
MOST_LOGPROBS = 20
COMPLETION_TOKENS = 16  # max_tokens of /v1/completions where it is not given, as in OpenAI's interface

_SHARED = {"model", "stream", "stream_options", "max_tokens", "temperature", "top_p", "top_k", "repetition_penalty",
           "presence_penalty", "frequency_penalty", "stop", "n", "seed", "logprobs", "response_format"}
_CHAT = _SHARED | {"messages", "max_completion_tokens", "drop_oldest", "top_logprobs"}
_TEMPLATE = {"tools", "tool_choice", "chat_template_kwargs"}  # what a chat of TeleChat2 and 3 has besides
_COMPLETION = _SHARED | {"prompt"}
_WITHOUT_EFFECT = {"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key",
                   "parallel_tool_calls"}
# Fields that are not supported, with the values that ask for nothing.
_NEUTRAL = {"top_logprobs": (0,), "logit_bias": ({},), "echo": (False,), "suffix": ("",), "best_of": (1,), "tools": ([],),
            "functions": ([],), "tool_choice": ("none", "auto"), "function_call": ("none", "auto"), "modalities": (["text"],)}


@dataclasses.dataclass(frozen=True)
class Ask:
    """A request, ready for the engine."""

    model: str  # one of `Model.names`
    chat: bool
    prompts: list  # of lists of token ids
    n: int  # answers to each
    params: SamplingParams
    stops: tuple
    stream: bool
    include_usage: bool
    thinking: bool = False  # whether the prompts have opened a thought
    tools: list = None  # definitions of the tools that may be called; None: calls are text


@dataclasses.dataclass(frozen=True)
class Model:
    """What a server offers: the name that requests use, and what prompts are built with."""

    name: str
    settings: object  # GenerationSettings
    max_length: int  # of prompt and answer together
    vocab_size: int
    system: str = "refuse"  # or "prepend": a system message goes in front of the first question
    adapters: tuple = ()  # names of LoRA adapters, each a model of its own to those who ask

    @property
    def names(self):
        """The models that a request may name."""
        return self.name, *self.adapters

    def adapter_of(self, name):
        """The adapter that one of `names` stands for, or None."""
        return name if name in self.adapters else None

    def listed(self):
        """The models, as a sentence ends with them."""
        return ", ".join(map(repr, self.names))


def parse_body(data):
    """The JSON object in a request's body, bytes → dict.

    Raises:
        APIError: it is not one, or holds what UTF-8 cannot express.
    """
    try:
        body = json.loads(data.decode("utf-8"), parse_constant=_no_constant)
        json.dumps(body, ensure_ascii=False).encode("utf-8")
    except UnicodeDecodeError as error:
        raise APIError(400, f"the body is not UTF-8 (byte {error.start})") from None
    except UnicodeEncodeError:
        raise APIError(400, "the body holds half of a surrogate pair; write the whole character") from None
    except RecursionError:
        raise APIError(400, "the body is nested too deeply") from None
    except ValueError as error:
        raise APIError(400, f"the body is not JSON: {error}"[:200]) from None
    if not isinstance(body, dict):
        raise APIError(400, "the body must be a JSON object")
    return body


def _no_constant(name):
    raise ValueError(f"{name} is not a JSON number")


def read_chat(body, model):
    """The `Ask` of a /v1/chat/completions body (dict).

    ``drop_oldest: true``, which is not OpenAI's, drops the oldest turns of a conversation that is too
    long, as the official chat does; without it such a conversation is refused.

    Raises:
        APIError: a field is wrong.
    """
    template = model.settings.chat_format.template
    _check_fields(body, _CHAT if template is None else _CHAT | _TEMPLATE, model)
    history, question = plain_messages(body, model.system) if template is None else template_messages(body)
    tools = None if template is None else read_offer(body)
    thinking = read_thinking(body, template)
    limit = _max_tokens(body, "max_completion_tokens", model) or _max_tokens(body, "max_tokens", model)
    longest = limit or model.settings.longest_answer(model.max_length)
    tokenizer, chat_format = model.settings.tokenizer, model.settings.chat_format
    drop_oldest = _flag(body, "drop_oldest")
    if drop_oldest:
        # Half of the length is kept for the answer, or what max_tokens asks for if that is less.
        room = min(longest, model.max_length // 2)
        prompt = build_prompt(tokenizer, history, question, max(model.max_length - room, 4), chat_format,
                              honour_leading_marker=False, fit=True, tools=tools, thinking=thinking)
    else:
        everything = 1 << 40
        prompt = build_prompt(tokenizer, history, question, everything, chat_format, honour_leading_marker=False,
                              tools=tools, thinking=thinking)
    ask = _ask(body, model, [prompt], None if drop_oldest else limit, longest, "messages", True, _chat_logprobs(body))
    return dataclasses.replace(ask, thinking=thinking, tools=tools)


def read_completion(body, model):
    """The `Ask` of a /v1/completions body (dict).

    A prompt is continued as it stands: no control token is added, and one spelt in a text is text;
    lists of token ids may hold them.

    Raises:
        APIError: a field is wrong.
    """
    _check_fields(body, _COMPLETION, model)
    given = body.get("prompt")
    if isinstance(given, str) or (isinstance(given, list) and given and all(map(_is_int, given))):
        given = [given]
    if not isinstance(given, list) or not given or len(given) > MOST_CHOICES:
        raise APIError(400, f"prompt must be a text, a list of token ids, or a list of 1 to {MOST_CHOICES} of these",
                      "prompt")
    prompts = [_completion_prompt(prompt, model) for prompt in given]
    limit = _max_tokens(body, "max_tokens", model)
    logprobs = None if body.get("logprobs") is False else _whole(body, "logprobs", 0, MOST_LOGPROBS)
    return _ask(body, model, prompts, limit, limit or COMPLETION_TOKENS, "prompt", False, logprobs)


def _chat_logprobs(body):
    """How many tokens to tell the log-probabilities of beside each one's own; None: of none."""
    top = _whole(body, "top_logprobs", 0, MOST_LOGPROBS)
    wanted = _flag(body, "logprobs")
    if top and not wanted:
        raise APIError(400, f"top_logprobs {top} goes with logprobs true", "top_logprobs")
    return (top or 0) if wanted else None


def _completion_prompt(prompt, model):
    if isinstance(prompt, str):
        ids = model.settings.tokenizer.encode(prompt, control_tokens=False)
    elif isinstance(prompt, list) and all(map(_is_int, prompt)):
        ids = prompt
        wrong = [token for token in ids if not 0 <= token < model.vocab_size]
        if wrong:
            raise APIError(400, f"token id {str(wrong[0])[:40]} is outside the vocabulary of {model.vocab_size}", "prompt")
    else:
        raise APIError(400, "each prompt must be a text or a list of token ids", "prompt")
    if not ids:
        raise APIError(400, "a prompt must hold at least one token", "prompt")
    return ids


def _ask(body, model, prompts, must_fit, max_tokens, field, chat, logprobs):
    for prompt in prompts:
        if len(prompt) + (must_fit or 1) > model.max_length:
            answer = f" and max_tokens {must_fit}" if must_fit else ""
            raise APIError(400, f"{field} of {len(prompt)} tokens{answer} exceed the {model.max_length} that this server "
                               "has for prompt and answer together; shorten them",
                          field, "context_length_exceeded")
    n = _whole(body, "n", 1, MOST_CHOICES)
    n = 1 if n is None else n
    if n * len(prompts) > MOST_CHOICES:
        raise APIError(400, f"n times the number of prompts must be at most {MOST_CHOICES}", "n")
    options = body.get("stream_options")
    if options is not None and (not isinstance(options, dict) or not isinstance(
            options.get("include_usage"), (bool, type(None)))):
        raise APIError(400, 'stream_options must be {"include_usage": true or false}', "stream_options")
    form = body.get("response_format")
    if form is not None and form != {"type": "text"}:
        kind = form.get("type") if isinstance(form, dict) else form
        raise APIError(400, f'response_format {short(kind)} is not supported, {{"type": "text"}} alone; ask for the '
                            "form you want in the question", "response_format", "unsupported_parameter")
    return Ask(body["model"], chat, prompts, n, _params(body, model, max_tokens, logprobs), _stops(body), _flag(body, "stream"),
               bool(options and options.get("include_usage")))


def _params(body, model, max_tokens, logprobs):
    given = {"temperature": _number(body, "temperature", 0, 2), "top_p": _number(body, "top_p", 0, 1),
             "top_k": _whole(body, "top_k", 0, 1 << 31),
             "repetition_penalty": _number(body, "repetition_penalty", 0.01, 100),
             "presence_penalty": _number(body, "presence_penalty", -2, 2),
             "frequency_penalty": _number(body, "frequency_penalty", -2, 2)}
    if given["top_p"] == 0:
        # OpenAI's interface allows 0: the most likely token alone.
        given["top_p"], given["top_k"] = None, 1
    seed = _whole(body, "seed", -(1 << 63), (1 << 64) - 1)
    # Drawn here, so that every process gets the same.
    seed = secrets.randbits(63) if seed is None else seed % (1 << 64)
    values = {**model.settings.sampling, **{name: value for name, value in given.items() if value is not None}}
    return SamplingParams(max_tokens, stop_ids=model.settings.stop_ids, excluded_ids=model.settings.excluded_ids,
                          seed=seed, logprobs=logprobs, **values)


def _check_fields(body, known, model):
    for name, value in body.items():
        if value is None or name in known or name in _WITHOUT_EFFECT:
            continue
        if name in _NEUTRAL:
            if value not in _NEUTRAL[name]:
                raise APIError(400, f"{name} is not supported; leave it out", name, "unsupported_parameter")
        else:
            name = name[:60]
            raise APIError(400, f"there is no field {name!r} here; leave it out", name, "unknown_parameter")
    name = body.get("model")
    if not isinstance(name, str):
        raise APIError(400, f"model must be a text: {model.name!r}", "model")
    if name not in model.names:
        raise APIError(404, f"there is no model {name[:60]!r} here; this server has {model.listed()}", "model",
                      "model_not_found")


def _stops(body):
    stops = body.get("stop")
    stops = [] if stops is None else [stops] if isinstance(stops, str) else stops
    if not isinstance(stops, list) or len(stops) > MOST_STOPS or not all(
            isinstance(stop, str) and 0 < len(stop) <= LONGEST_STOP for stop in stops):
        raise APIError(400, f"stop must be a text or a list of at most {MOST_STOPS}, each of 1 to {LONGEST_STOP} "
                           "characters", "stop")
    return tuple(stops)


def _max_tokens(body, name, model):
    return _whole(body, name, 1, model.max_length)


def _is_int(value):
    return isinstance(value, int) and not isinstance(value, bool)


def _whole(body, name, least, most):
    value = body.get(name)
    if value is not None and not (_is_int(value) and least <= value <= most):
        raise APIError(400, f"{name} must be a whole number from {least} to {most}, not {short(value)}", name)
    return value


def _number(body, name, least, most):
    value = body.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not least <= value <= most:
        raise APIError(400, f"{name} must be a number from {least} to {most}, not {short(value)}", name)
    return float(value)


def _flag(body, name):
    value = body.get(name)
    if value is not None and not isinstance(value, bool):
        raise APIError(400, f"{name} must be true or false, not {short(value)}", name)
    return bool(value)
