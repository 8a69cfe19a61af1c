"""The main memory that answering or scoring takes on CPU, from shapes alone."""

import math

from telechat.checkpoint.layout import parameter_shapes
from telechat.memory_check import available_bytes, check_memory
from telechat.nn.kernels import ROWS_AT_ONCE, on_cpu
from telechat.nn.long_attention import PIECE, is_long
from telechat.parallel.mesh import local_process_count
from telechat.parallel.parallel_config import process_count

FLOAT32 = 4
RESERVE = 0.1  # the share of the available memory that a cache chosen by default leaves
SHORT, SHORTEST = 2048, 128  # tokens: lengths that a cache chosen by default is brought down to first, and at last
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


def weight_bytes(config, width, processes=1):
    """Bytes of one process's weights; what every process holds whole, the norms, is a trifle."""
    return sum(map(math.prod, parameter_shapes(config).values())) * width // processes


def inference_memory(config, dtype, prompt, prompts=1, slots=0, length=0, logits=1, processes=1, local=None):
    """What the processes on this machine need together.

    Args:
        config (TeleChatConfig): the architecture.
        dtype (str): of the weights. On CPU, which main memory is about, the rest is float32 in any case.
        prompt, prompts (int): tokens of the longest sequence that goes through the model whole, and how many at once.
        slots, length (int): sequences in the cache, and tokens of each.
        logits (int): rows of logits at a time.
        processes, local (int): that share the model, and how many of them are here; all if not given.

    Returns:
        dict: part → bytes; "weights", "key-value cache", "work", "framework".
    """
    width = FLOAT32 if dtype == "float32" else 2
    shapes = parameter_shapes(config)
    heads = (config.n_head + 2 * config.num_key_value_heads) * config.head_dim // processes
    rows, side = prompt * prompts, PIECE if is_long(prompt, 0.0) else prompt
    work = rows * (_HIDDEN * config.hidden_size + _HEADS * heads)
    work += _SCORES * prompts * config.n_head // processes * side ** 2
    work += 3 * min(rows, ROWS_AT_ONCE) * config.ffn_hidden_size // processes
    work += _LOGITS * logits * config.vocab_size
    largest = max(map(math.prod, shapes.values()))
    if width < FLOAT32:
        block = sum(math.prod(shape) for name, shape in shapes.items() if ".h.0." in name)
        work += max(largest, _CASTS * block) // processes
    work += 2 * length * config.head_dim  # rotary tables
    # While weights are read, one is there as the file has it and converted, besides itself.
    work = max(work * FLOAT32, 2 * largest * FLOAT32)
    local = processes if local is None else local
    return {"weights": local * weight_bytes(config, width, processes),
            "key-value cache": local * cache_bytes(config, slots, length, FLOAT32, processes),
            "work": local * work, "framework": local * FRAMEWORK}


def cache_that_fits(config, dtype, slots, length, available, processes=1, local=None, fixed=()):
    """How many sequences of how many tokens have a cache that fits beside all else, at most ``slots`` and ``length``.

    Length is halved down to `SHORT` first, then the number of sequences, then length again.

    Args:
        available (int): bytes, of which a tenth is left for others; None: unknown, all fits.
        fixed (collection of str): "slots", "length": not to be changed.
        others: as of `inference_memory`.

    Returns:
        (int, int): slots and length; the least there are where even these do not fit.
    """
    def fits():
        parts = inference_memory(config, dtype, length, 1, slots, length, slots, processes, local)
        return available is None or sum(parts.values()) <= available * (1 - RESERVE)

    while not fits() and length > SHORT and "length" not in fixed:
        length = max(length // 2, SHORT)
    while not fits() and slots > 1 and "slots" not in fixed:
        slots //= 2
    while not fits() and length > SHORTEST and "length" not in fixed:
        length = max(length // 2, SHORTEST)
    return slots, length


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
