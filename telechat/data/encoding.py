"""The ids and labels of conversations: what is learnt of them, and what the loss leaves out."""

import functools
import os

import numpy as np

from telechat.data.chat_template import Part
from telechat.errors import InputError

IGNORED = -100  # label of a token that the loss leaves out
_CHUNK = 1024  # conversations that are tokenised in one call


def encode_conversation(tokenizer, chat_format, turns):
    """Ids and labels of one conversation, as the incumbent's preprocessing has them.

    Questions and answers are tokenised each on its own, so each begins with the tokenizer's
    leading space; a control token spelt in one is text there.

    Args:
        tokenizer: `Tokenizer`.
        chat_format: `ChatFormat`.
        turns: list of (question, answer), or a `Conversation` where the format has a template.

    Returns:
        (input_ids, labels): two lists of int of the same length. A label is the token's own id for
        answers and end tokens, -100 elsewhere; the shift by one is the loss's work.
    """
    parts = learnt_parts(chat_format, turns)
    encoded = (np.array(tokenizer.encode(part.content, control_tokens=False), np.int32) for part in parts
               if isinstance(part.content, str))
    input_ids, labels = next(join_parts([parts], encoded))
    return input_ids.tolist(), labels.tolist()


def learnt_parts(chat_format, conversation):
    """The parts (`Part`) of a conversation to learn from, whichever the format."""
    if chat_format.template is not None:
        parts = chat_format.template.parts(chat_format, conversation.messages, conversation.tools, learning=True)
        return chat_format.template.with_spelt_tokens(parts) if conversation.spells_tokens else parts
    parts = [] if chat_format.start is None else [Part(chat_format.start)]
    for question, answer in conversation:
        parts += [Part(chat_format.user), Part(question), Part(chat_format.bot), Part(answer, True),
                  Part(chat_format.end, True)]
    return parts


def join_parts(conversations, encoded):
    """Ids and labels of conversations, all joined in one array each, of which a conversation's are a view.

    Args:
        conversations: list of conversations, each a list of `Part`.
        encoded: iterator over the ids of their texts, int32 arrays, in order.

    Yields:
        (input_ids, labels), int32 arrays of the same length, a conversation each.
    """
    pieces = [_one_id(part.content) if isinstance(part.content, int) else next(encoded)
              for parts in conversations for part in parts]
    lengths = np.fromiter(map(len, pieces), np.int64, len(pieces))
    ids = np.concatenate(pieces)
    learnt = np.repeat([part.learnt for parts in conversations for part in parts], lengths)
    labels = np.where(learnt, ids, np.int32(IGNORED))
    ends = np.concatenate(([0], np.cumsum(lengths)))[np.cumsum([0, *map(len, conversations)])].tolist()
    for start, end in zip(ends, ends[1:]):
        yield ids[start:end], labels[start:end]


@functools.lru_cache
def _one_id(index):
    return np.array([index], np.int32)


def encode_conversations(tokenizer, chat_format, conversations, workers=None):
    """Tokenise conversations, many at a time.

    Args:
        tokenizer: `Tokenizer`.
        chat_format: `ChatFormat`.
        conversations: list of conversations, each as `learnt_parts` takes it.
        workers: number of threads, see `Tokenizer.encode_batch`; None: one a processor. The result does not
            depend on it.

    Yields:
        (input_ids, labels), two int32 arrays of the same length, a conversation each, in order.

    Raises:
        InputError: ``workers`` is wrong.
    """
    if workers is not None and (isinstance(workers, bool) or not isinstance(workers, int) or workers < 1):
        raise InputError(f"workers must be a whole number of 1 or more, not {workers!r}")
    workers = workers or os.cpu_count() or 1
    for start in range(0, len(conversations), _CHUNK):
        chunk = conversations[start:start + _CHUNK]
        parts = [learnt_parts(chat_format, conversation) for conversation in chunk]
        texts = [part.content for some in parts for part in some if isinstance(part.content, str)]
        encoded = iter(tokenizer.encode_batch(texts, workers))
        yield from join_parts(parts, encoded)
