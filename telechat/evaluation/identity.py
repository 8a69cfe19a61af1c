"""What an evaluation is of: model, data and settings by their content, so that no answer of another one is taken up."""

import dataclasses
import json

import telechat
from telechat.checkpoint.safetensors_files import weight_digests
from telechat.content import digest_of


def identify(directory, config, settings, files, **given):
    """The identity of an evaluation, a dict that JSON can express; equal for equal content, wherever it lies.

    Args:
        directory (str): of the checkpoint; its weights count by names, sizes and blocks (`sampled_digest`).
        config (TeleChatConfig): of the model.
        settings (GenerationSettings): tokenizer and chat format.
        files (dict): name in the identity → path, of all files of data; they count whole.
        given: task, split, shots and whatever else changes the numbers.
    """
    template = settings.chat_format.template
    return json.loads(json.dumps({
        **given, "config": config.to_dict(), "weights": weight_digests(directory), "tokenizer": settings.tokenizer.sha256,
        "chat_format": settings.chat_format.tokens(settings.tokenizer),
        "chat_template": None if template is None else dataclasses.asdict(template),
        "data": {name: digest_of(path) for name, path in files.items()}, "telechat": telechat.__version__}))
