"""Whether a model's weights and key-value cache fit into memory, told before either is there.

A cache that is too large would otherwise be noticed late: Linux promises memory that it has not got and ends the
process without a word when it is written to.
"""

import math

from telechat.checkpoint.layout import parameter_shapes
from telechat.errors import InputError

FLOAT32 = 4
# Of a control group (a container), version 2 and 1: its limit and what it uses.
CONTROL_GROUPS = (("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
                  ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"))


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


def available_bytes(meminfo="/proc/meminfo", control_groups=CONTROL_GROUPS):
    """Bytes of main memory that a program may still take, or None where the system does not say."""
    try:
        with open(meminfo, encoding="ascii") as file:
            values = dict(line.split(":", 1) for line in file)
        available = int(values["MemAvailable"].split()[0]) * 1024
    except (OSError, ValueError, KeyError, IndexError):
        return None
    for limit, used in control_groups:
        try:
            with open(limit, encoding="ascii") as first, open(used, encoding="ascii") as second:
                available = min(available, int(first.read()) - int(second.read()))
        except (OSError, ValueError):
            continue  # no such version, or "max": no limit
    return max(available, 0)


def check_room(config, slots, length, dtype, processes, available):
    """Raise InputError where weights and cache of one process are more than the available main memory.

    Args:
        config (TeleChatConfig): the architecture.
        slots, length (int): sequences, and tokens of each.
        dtype (str): of the weights. On CPU, which main memory is about, the cache is float32 in any case.
        processes (int): that share the model.
        available (int): bytes, or None: unknown, nothing is refused.
    """
    weights = weight_bytes(config, FLOAT32 if dtype == "float32" else 2, processes)
    cache = cache_bytes(config, slots, length, FLOAT32, processes)
    if available is not None and weights + cache > available:
        raise InputError(f"--max_batch {slots} sequences of --max_length {length} tokens take {cache / 1e9:,.1f} GB of "
                         f"key-value cache, reserved at the start, and the weights {weights / 1e9:,.1f} GB; "
                         f"{available / 1e9:,.1f} GB of memory are free: lower --max_batch or --max_length")
