"""The learning rate as a function of the step."""

import math


def learning_rate(config, step):
    """The rate of step ``step`` (0 first).

    It rises linearly over ``warmup_steps``, reaching ``learning_rate`` at the last of them, then
    falls to ``min_learning_rate`` at ``total_steps`` along a cosine or a line, or stays.
    """
    warmup = config.resolved_warmup_steps
    if step < warmup:
        return config.learning_rate * (step + 1) / warmup
    progress = min((step - warmup) / max(config.total_steps - warmup, 1), 1.0)
    remaining = {"constant": 1.0, "linear": 1.0 - progress,
                 "cosine": 0.5 * (1.0 + math.cos(math.pi * progress))}[config.lr_schedule]
    return config.min_learning_rate + (config.learning_rate - config.min_learning_rate) * remaining
