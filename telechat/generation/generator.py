"""Generator: prompts in, tokens out."""

from telechat.errors import InputError
from telechat.generation.batch import Batch
from telechat.generation.engine import Engine
from telechat.generation.prompt_lookup import check_speculation
from telechat.model import check_ids


class Generator:
    """Generates with a key-value cache; graphs are compiled at first use and kept.

    Args:
        model (TeleChat): the model.
        max_length (int): most tokens of a sequence, prompt and answer together.
        batch_size (int): how many prompts are answered at a time.
        cache_tokens (int): how many tokens the cache holds, of all sequences; None: as many as all can have.
        prefix_cache (bool): whether prompts that begin with the same tokens share what was computed of them.
        keep_prefixes (bool): whether a prompt that begins as one of an earlier call shares what was computed then. Only
            where the weights stay as they are.
        speculate (int): how many tokens are guessed ahead at most, see `PromptLookup`; answers are the same, and come
            sooner where they quote.

    Raises:
        InputError: max_length or batch_size is not positive, or speculate negative.
    """

    def __init__(self, model, max_length=2048, batch_size=1, cache_tokens=None, prefix_cache=True,
                 keep_prefixes=False, speculate=0):
        self.speculate = check_speculation("speculate", speculate)
        for name, value in (("max_length", max_length), ("batch_size", batch_size)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise InputError(f"{name} must be a positive whole number, not {value!r}")
        self.model = model
        self.max_length = max_length
        self.batch_size = batch_size
        self.keep_prefixes = keep_prefixes
        self.cache_tokens = cache_tokens
        self._engine = Engine(model, max_length, prefix_cache, self.speculate)

    def generate(self, prompts, params):
        """Answer each prompt.

        Args:
            prompts (list of lists of int): token ids; lengths may differ.
            params (SamplingParams): for all of them.

        Returns:
            list of lists of int: the new tokens of each, in the prompts' order, stop token left out.

        Raises:
            InputError: a prompt is empty, leaves no room below max_length, or holds an id outside
                the vocabulary.
            Exception: what failed in one of the answers; it comes when all others are done, which only
                `answers` hands out then.
        """
        prompts = [self._check(prompt) for prompt in prompts]
        answers = [None] * len(prompts)
        failed = None
        for index, ids, error in self.answers(prompts, params):
            answers[index] = ids
            failed = failed or error
        if failed is not None:
            raise failed
        return answers

    def answers(self, prompts, params):
        """Answer each prompt, and hand out each answer when it is complete.

        Arguments as in `generate`. Whatever fails in one answer, or is wrong with one prompt, ends that one alone.

        Yields:
            (int, list of int, Exception): the prompt's index, its new tokens, and what ended it early, or None.
        """
        good = {}  # index → ids
        for index, prompt in enumerate(prompts):
            try:
                good[index] = self._check(prompt)
            except InputError as error:
                yield index, [], error
        indices, answers = list(good), [[] for _ in good]
        for step in self._run(list(good.values()), params):
            if step.token is not None:
                answers[step.key].append(step.token)
            if step.reason is not None:
                yield indices[step.key], answers[step.key], step.error

    def stream(self, prompt, params):
        """Yield the answer's tokens one by one; arguments and errors as in `generate`."""
        prompt = self._check(prompt)
        return _tokens(self._run([prompt], params))

    def _check(self, prompt):
        ids = [int(token) for token in prompt]
        if not ids:
            raise InputError("a prompt must hold at least one token")
        if len(ids) >= self.max_length:
            raise InputError(f"the prompt has {len(ids)} tokens, and max_length {self.max_length} leaves no room "
                             "for an answer; shorten the prompt or raise max_length")
        check_ids([ids], self.model.config.vocab_size)
        return ids

    def _run(self, prompts, params):
        """Yield a `Step` at a time, prompts' indices for keys; a slot that falls free takes the next waiting prompt."""
        if not prompts:
            return
        slots = min(self.batch_size, len(prompts))
        length = max(min(len(prompt) + params.max_new_tokens, self.max_length) for prompt in prompts)
        if self.keep_prefixes:  # which a cache of another size would lose
            slots, length = self.batch_size, self.max_length
        blocks = None
        if self.cache_tokens is not None:
            blocks = max(self.cache_tokens, length) // self._engine.block_size + 1
        self._engine.reserve(slots, length, blocks)
        if not self.keep_prefixes:
            self._engine.forget()
        batch = Batch(self._engine, speculate=self.speculate)
        try:
            for index, prompt in enumerate(prompts):
                batch.add(index, prompt, params, index)
            while len(batch):
                yield from batch.prefill()
                yield from batch.decode()
        finally:
            for index in range(len(prompts)):
                batch.remove(index)


def _tokens(steps):
    """The tokens of one sequence's steps; raises what ended it early."""
    for step in steps:
        if step.error is not None:
            raise step.error
        if step.token is not None:
            yield step.token
