"""The main memory that answering or scoring takes on CPU, from shapes alone."""

import math
import typing

from telechat.checkpoint.layout import parameter_shapes
from telechat.checkpoint.products import is_product
from telechat.errors import InputError
from telechat.fields import byte_size
from telechat.generation.operator_steps import ROWS
from telechat.memory_check import available_bytes, check_memory, gigabytes
from telechat.model import as_dtype
from telechat.nn.blockwise_attention import SCORES, is_long
from telechat.nn.kernel_choice import cpu_obstacle
from telechat.nn.kernels import ROWS_AT_ONCE, on_cpu
from telechat.parallel.parallel_config import process_count
from telechat.parallel.rendezvous import local_process_count
from telechat.quantization.checkpoint import product_bytes, settings_of

FLOAT32 = 4
RESERVE = 0.1  # the share of the available memory that a cache chosen by default leaves
SHORTEST = 128  # tokens: the length that a cache chosen by default is brought down to at last
FRAMEWORK = 600_000_000  # MindSpore, its compiler, and the graphs' code: measured of a negligible model, 560 MB
# Float32 copies of a row that a prompt's pass holds at once: of the hidden width, and of queries, keys and values.
_HIDDEN, _HEADS = 10, 3
_SCORES = 3  # of the attention scores
_LOGITS = 7  # of the logits: themselves, and what sampling or scoring makes of them in float64
_CASTS = 2  # layers whose lower weights are there in float32 as well


def cache_bytes(config, slots, length, width, processes=1):
    """Bytes of one process's keys and values of all layers.

    Args:
        config (TeleChatConfig): the architecture.
        slots, length (int): sequences, and tokens of each.
        width (int): bytes of a number.
        processes (int): that share the heads.
    """
    return 2 * config.n_layer * slots * length * config.num_key_value_heads * config.head_dim * width // processes


def weight_bytes(config, width, processes=1, scale=FLOAT32):
    """Bytes of one process's weights, quantised ones as they are, with scales of so many bytes; what every process holds
    whole, the norms, is a trifle."""
    settings = settings_of(config)
    return sum(product_bytes(shape, settings, scale) if settings and is_product(name) else math.prod(shape) * width
               for name, shape in parameter_shapes(config).items()) // processes


def inference_memory(config, dtype, prompt, prompts=1, slots=0, length=0, logits=1, processes=1, local=None, cached=None,
                     operators=False, adapters=0):
    """What the processes on this machine need together.

    Args:
        config (TeleChatConfig): the architecture.
        dtype (str): of the weights. On CPU, which main memory is about, the rest is float32 in any case.
        prompt, prompts (int): tokens of the longest sequence that goes through the model whole, and how many at once.
        slots, length (int): sequences in the cache, and tokens of each.
        logits (int): rows of logits at a time.
        processes, local (int): that share the model, and how many of them are here; all if not given.
        cached (int): tokens that the cache holds; None: those of its sequences.
        operators (bool): prompts go through the operators for CPUs, a part at a time and without a matrix of scores.
        adapters (int): bytes of LoRA adapters beside the weights, in each process.

    Returns:
        dict: part → bytes; "weights", "key-value cache", "work", "framework", and "adapters" where there are any.
    """
    width = FLOAT32 if dtype == "float32" else 2
    shapes = parameter_shapes(config)
    heads = (config.n_head + 2 * config.num_key_value_heads) * config.head_dim // processes
    rows, scores = prompt * prompts, SCORES if is_long(prompt) else prompt ** 2
    if operators:
        rows, scores = min(rows, ROWS), 0
    work = rows * (_HIDDEN * config.hidden_size + _HEADS * heads)
    work += _SCORES * prompts * config.n_head // processes * scores
    work += 3 * min(rows, ROWS_AT_ONCE) * config.ffn_hidden_size // processes
    work += _LOGITS * logits * config.vocab_size
    largest = max(map(math.prod, shapes.values()))
    if width < FLOAT32:
        block = sum(math.prod(shape) for name, shape in shapes.items() if ".h.0." in name)
        work += max(largest, _CASTS * block) // processes
    work += 2 * length * config.head_dim  # rotary tables
    # While a process reads its part of the weights, one is there twice.
    work = max(work * FLOAT32, largest * width // processes)
    local = processes if local is None else local
    return {"weights": local * weight_bytes(config, width, processes),
            "key-value cache": local * cache_bytes(config, 1, slots * length if cached is None else cached, FLOAT32, processes),
            "work": local * work, "framework": local * FRAMEWORK, **({"adapters": local * adapters} if adapters else {})}


def cache_width(dtype):
    """Bytes of a number in the cache of a model with weights in ``dtype`` (str)."""
    return FLOAT32 if on_cpu() or dtype == "float32" else 2


def runs_operators(dtype):
    """Whether a model with weights in ``dtype`` (str) is computed by the operators for CPUs."""
    return on_cpu() and cpu_obstacle(as_dtype(dtype)) is None


class CachePlan(typing.NamedTuple):
    """How large a cache is, and what it is for."""

    slots: int  # sequences that run at a time
    length: int  # tokens of one, at most
    tokens: int  # that the cache holds, of all of them

    def blocks(self, block_size):
        """In blocks of so many tokens, beside the one that is not read."""
        return max(-(-self.tokens // block_size), -(-self.length // block_size))


def plan_cache(config, dtype, slots, length, available, given=None, fixed_length=False, processes=1, local=None, **shape):
    """The cache of a server or of answers to many prompts.

    Without ``given`` it holds all that ``slots`` sequences of ``length`` tokens can, or as much as fits beside all else;
    where that is less than one sequence, length is halved down to `SHORTEST`.

    Args:
        config (TeleChatConfig), dtype (str): of the model.
        available (int): bytes, of which a tenth is left for others; None: unknown, all fits.
        given (str): the size that the user asked for with ``--cache_memory``, e.g. "4GB", for each process.
        fixed_length (bool): length is not to be changed.
        others: as of `inference_memory`.

    Returns:
        CachePlan: the least there is where even that does not fit.

    Raises:
        InputError: what was given is no size, or is too small for one sequence.
    """
    width = cache_width(dtype)
    if given is not None:
        tokens = byte_size(given, "--cache_memory") // cache_bytes(config, 1, 1, width, processes)
        least = length if fixed_length else min(length, SHORTEST)
        if tokens < least:
            raise InputError(f"--cache_memory {given} holds {tokens} tokens, and a sequence of {least} takes "
                             f"{gigabytes(cache_bytes(config, 1, least, width, processes))} GB: give at least that"
                             + (f", or lower --max_length {length}" if fixed_length else ""))
        return CachePlan(slots, min(length, tokens), tokens)

    def room(length):
        rest = inference_memory(config, dtype, length, 1, 0, length, slots, processes, local, **shape)
        left = available * (1 - RESERVE) - sum(rest.values())
        return int(left // (cache_bytes(config, 1, 1, width, processes) * (processes if local is None else local)))

    if available is None:
        return CachePlan(slots, length, slots * length)
    return fit_cache(slots, length, fixed_length, room)


def fit_cache(slots, length, fixed_length, room):
    """A `CachePlan` of all that the sequences can fill, or of as much as there is room for; see `plan_cache`.

    room (function): a length → how many tokens fit beside all else that sequences of that length need.
    """
    while room(length) < length and length > SHORTEST and not fixed_length:
        length = max(length // 2, SHORTEST)
    return CachePlan(slots, length, max(min(slots * length, room(length)), length))


def check_inference_memory(config, dtype, lower, ignore=False, **shape):
    """Raise InputError where a model with its cache needs more main memory than there is; to be asked before it is read.

    A card's memory shows only when it is taken.

    Args:
        config (TeleChatConfig), dtype (str): of the model.
        lower (str): what the user may change.
        ignore (bool): warn only.
        shape: ``prompt``, ``slots`` and so on, of `inference_memory`.
    """
    if on_cpu():
        parts = inference_memory(config, dtype, **shape, processes=process_count(), local=local_process_count())
        if dtype == "float32" and parts["weights"] == max(parts.values()):
            lower += ", give --dtype bfloat16"
        check_memory(parts, "the model", lower, available_bytes(), ignore)
