"""The memory that answering takes on an Ascend card, from shapes alone; on a CPU it is memory.py that says so.

Read off on the simulated card (simulator/README.md), where MindSpore's own back end allocates: tests/ascend/test_memory.py
holds the whole to its peaks.
"""

from telechat.generation.memory import FLOAT32, cache_bytes, weight_bytes
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
