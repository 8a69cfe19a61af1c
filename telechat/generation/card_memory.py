"""The memory that answering takes on an Ascend card, from shapes alone; on a CPU it is memory.py that says so.

Read off on the simulated card (simulator/README.md), where MindSpore's own back end allocates: tests/ascend/test_memory.py
holds the whole to its peaks.
"""

import mindspore as ms

from telechat.errors import InputError
from telechat.generation.memory import FLOAT32, RESERVE, cache_bytes, fit_cache, weight_bytes
from telechat.memory_check import gigabytes
from telechat.model import as_dtype
from telechat.nn.flash_attention import obstacle as flash_obstacle
from telechat.nn.paged_attention import block_size
from telechat.nn.paged_attention import obstacle as paged_obstacle
from telechat.parallel.estimate_card import communicator_bytes

MIB, KIB = 2 ** 20, 2 ** 10
INTERNAL_KERNELS = 100 * MIB  # that MindSpore sets aside for them, whatever the model
LARGEST_TABLE = 16384  # tokens of a sequence beyond which PagedAttention's room to work in grows no more
_INNER, _HEADS, _HIDDEN, _SCORES = 3, 3, 6, 4  # of a prompt's pass: tensors of each width that are there at once
_GROUPS = 2  # HCCL's, of all processes: MindSpore's own and ours


def paged_workspace(dtype, length):
    """Bytes that PagedAttention works in, once for all layers; dtype "bfloat16" or "float16"."""
    each = 3 * KIB if dtype == "float16" else 7 * KIB
    return int(24 * (16.25 * MIB + each * min(length, LARGEST_TABLE)))


def card_memory(config, dtype, slots, length, processes=1):
    """What one card holds at most while it answers.

    Args:
        config (TeleChatConfig): the architecture.
        dtype (str): of weights and cache.
        slots, length (int): sequences at a time, and tokens of each, prompt and answer; the longest prompt may fill it.
        processes (int): cards that share the model.

    Returns:
        dict: part → bytes; "weights", "key-value cache", "kernels", "work" and, with several cards, "hccl".
    """
    width, kind = FLOAT32 if dtype == "float32" else 2, as_dtype(dtype)
    paged = paged_obstacle(config, kind) is None
    tokens = -(-length // block_size(config.head_dim)) * block_size(config.head_dim) if paged else length
    heads = (config.n_head + 2 * config.num_key_value_heads) * config.head_dim // processes
    prompt = width * length * (_INNER * config.ffn_hidden_size // processes + _HEADS * heads + _HIDDEN * config.hidden_size)
    if flash_obstacle(kind, config.head_dim) is not None:
        prompt += _SCORES * FLOAT32 * config.n_head // processes * length ** 2
    token = (paged_workspace(dtype, length) if paged else 0) + 2 * slots * config.vocab_size * FLOAT32
    parts = {"weights": weight_bytes(config, width, processes, width),
             "key-value cache": cache_bytes(config, slots, tokens, width, processes),
             "kernels": INTERNAL_KERNELS, "work": max(prompt, token)}
    if processes > 1:
        parts["hccl"] = communicator_bytes(_GROUPS)
    return parts


def plan_card_cache(config, dtype, slots, length, total, free, fixed_length=False, processes=1):
    """The cache of a server on a card that holds its weights already, where the user names no size.

    As `plan_cache` on a CPU: all that ``slots`` sequences of ``length`` tokens can fill, or what is free beside the work of
    answering, less a tenth of the card; where that is less than one sequence, length is halved.

    Args:
        config (TeleChatConfig), dtype (str): of the model.
        slots, length, fixed_length, processes: as of `plan_cache`.
        total, free (int): bytes, of `card_bytes`.

    Raises:
        InputError: even one sequence does not fit.
    """
    def room(length):
        return cache_room(config, dtype, slots, length, total, free, processes)

    plan = fit_cache(slots, length, fixed_length, room)
    if room(plan.length) < plan.length:
        work = _work(config, dtype, slots, plan.length, processes)
        raise InputError(f"the card has {gigabytes(free)} GB free beside the weights, of which {gigabytes(RESERVE * total)} GB are "
                         f"kept, and answering {slots} sequences of {plan.length} tokens works in {gigabytes(work)} GB: "
                         f"too little for one of them; lower --max_batch {slots} or --max_length {plan.length}, share the "
                         "model over more cards, or give --cache_memory to try it all the same")
    return plan


def cache_room(config, dtype, slots, length, total, free, processes=1):
    """How many tokens a cache may hold beside the work of answering and a tenth of the card; below 0 where there is no room.

    Args:
        total, free (int): bytes of the card, and those that are left beside the weights.
        others: as of `card_memory`.
    """
    width = FLOAT32 if dtype == "float32" else 2
    left = free - RESERVE * total - _work(config, dtype, slots, length, processes)
    return int(left // cache_bytes(config, 1, 1, width, processes))


def _work(*arguments):
    """Bytes of what `card_memory` counts beside what stays: weights and cache."""
    return sum(size for name, size in card_memory(*arguments).items() if name not in ("weights", "key-value cache"))


def card_bytes():
    """The bytes of this process's card, and those of them that can still be taken: free, or idle in MindSpore's pool.

    To be asked when the weights are on the card; before anything is there it says 0.
    """
    card = ms.hal.get_device_properties(0, "Ascend")
    return card.total_memory, card.free_memory + ms.runtime.memory_reserved() - ms.runtime.memory_allocated()
