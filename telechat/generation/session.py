"""A conversation with a model: its history, and answers streamed as text."""

from telechat.data.answer_stream import spelt_answer
from telechat.generation import chat
from telechat.generation.sampling import SamplingParams


class ChatSession:
    """Multi-turn chat.

    Args:
        generator (Generator): answers.
        settings (GenerationSettings): tokenizer, chat format and stop tokens.
        params (SamplingParams): for every answer.
        honour_leading_marker (bool): whether a question may begin with the user token written out,
            as lines of the published files do; False where a person types.
    """

    def __init__(self, generator, settings, params, honour_leading_marker=True):
        self.generator = generator
        self.settings = settings
        self.params = params
        self.honour_leading_marker = honour_leading_marker
        self.history = []

    def ask(self, question):
        """Yield the answer's text piece by piece, never half a character.

        Question and answer join the history when the answer ends, an answer broken off included.
        """
        # Half of the length is kept for the answer, or what max_new_tokens asks for if that is less.
        room = min(self.params.max_new_tokens, self.generator.max_length // 2)
        prompt = chat.build_prompt(self.settings.tokenizer, self.history, question,
                                   self.generator.max_length - room, self.settings.chat_format,
                                   honour_leading_marker=self.honour_leading_marker, fit=True)
        answer = []
        try:
            for piece in stream_text(self.generator, self.settings, prompt, self.params):
                answer.append(piece)
                yield piece
        finally:
            self.history += [{"role": "user", "content": question}, {"role": "bot", "content": "".join(answer)}]

    def clear(self):
        """Forget the conversation."""
        self.history = []


def stream_text(generator, settings, prompt, params):
    """Yield the text that follows ``prompt`` (list of int) piece by piece; whole characters only.

    Thoughts and calls of tools stand in it between their tokens, spelt out.
    """
    tokens = generator.stream(prompt, params)
    try:
        yield from spelt_answer(settings.tokenizer, settings.chat_format.template, tokens,
                                opens_thought(settings.chat_format, prompt))
    finally:
        tokens.close()


def opens_thought(chat_format, prompt):
    """Whether a prompt's last control token opens a thought, which the answer goes on with."""
    template = chat_format.template
    if template is None or template.think is None:
        return False
    marks = {template.think, template.end_of_thought, chat_format.bot}
    return next((token for token in reversed(prompt) if token in marks), None) == template.think


def sampling_params(settings, generator, **given):
    """SamplingParams from a checkpoint's defaults and what the caller gave (None: not given)."""
    values = {**settings.sampling, **{name: value for name, value in given.items() if value is not None}}
    values.setdefault("max_new_tokens", settings.longest_answer(generator.max_length))
    return SamplingParams(stop_ids=settings.stop_ids, excluded_ids=settings.excluded_ids, **values)
