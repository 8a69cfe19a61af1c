"""TeleChat on MindSpore: fine-tune and run the 7B, 12B and 52B models, from a laptop to 16 cards."""

import importlib

__version__ = "0.1.0"

# Loaded at first use: importing MindSpore takes seconds, and preprocessing workers do without it.
_EXPORTS = {
    "TeleChatConfig": "telechat.config",
    "TeleChat": "telechat.model",
    "Tokenizer": "telechat.data.tokenizer",
    "Generator": "telechat.generation.generator",
    "SamplingParams": "telechat.generation.sampling",
    "Trainer": "telechat.training.trainer",
    "TrainConfig": "telechat.training.train_config",
    "StepResult": "telechat.training.trainer",
    "InputError": "telechat.errors",
}
_MODULES = {"chat": "telechat.generation.chat", "data": "telechat.data"}

__all__ = [*_EXPORTS, *_MODULES]


def __getattr__(name):
    if name in _EXPORTS:
        return getattr(importlib.import_module(_EXPORTS[name]), name)
    if name in _MODULES:
        return importlib.import_module(_MODULES[name])
    raise AttributeError(f"module 'telechat' has no attribute {name!r}")


def __dir__():
    return sorted([*globals(), *__all__])
