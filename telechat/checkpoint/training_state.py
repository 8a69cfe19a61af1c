"""Training checkpoints: a model directory plus what the optimizer needs to go on.

A checkpoint is ``checkpoint-NNNNNN`` in the run's output directory: a loadable model, with a
folder ``training_state`` inside. It appears under its name only when it is complete.
"""

import json
import os
import re
import shutil

from mindspore import Tensor
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from telechat.checkpoint.reader import CheckpointReader
from telechat.errors import InputError

_NAME = re.compile(r"checkpoint-(\d{6,})")
_STATE = "training_state"


def save_training_checkpoint(output_dir, trainer, info, tokenizer=None, keep=2):
    """Write ``checkpoint-NNNNNN`` for the trainer's step and drop the oldest beyond ``keep``.

    Args:
        output_dir (str): the run's directory.
        trainer (Trainer): model, moments and counters are saved.
        info (dict): what resuming must find unchanged (see `restore`).
        tokenizer (Tokenizer): its files go along, so that the directory can chat.
        keep (int): how many checkpoints stay.

    Returns:
        str: the checkpoint's path.

    Raises:
        InputError: the directory cannot be written; earlier checkpoints stay as they are.
    """
    path = os.path.join(output_dir, f"checkpoint-{trainer.step:06d}")
    partial = os.path.join(output_dir, f".checkpoint-{trainer.step:06d}.partial")
    try:
        os.makedirs(output_dir, exist_ok=True)
        shutil.rmtree(partial, ignore_errors=True)
        trainer.model.save_pretrained(partial)
        if tokenizer is not None:
            tokenizer.save(partial)
        state = os.path.join(partial, _STATE)
        os.makedirs(state)
        tensors = {name: tensor.asnumpy() for name, tensor in trainer.optimizer.state().items()}
        save_file(tensors, os.path.join(state, "rank-00000.safetensors"))
        with open(os.path.join(state, "state.json"), "w", encoding="utf-8") as file:
            json.dump({"step": trainer.step, "updates": trainer.optimizer.updates, **info}, file, indent=1)
        _flush(partial)
        shutil.rmtree(path, ignore_errors=True)
        os.rename(partial, path)
        _flush(output_dir, deep=False)
    except (OSError, SafetensorError, InputError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"checkpoint {path} cannot be written ({reason}); "
                         "free space or give another output_dir, then go on with --resume") from None
    for old in list_checkpoints(output_dir)[:-keep]:
        shutil.rmtree(old)
    return path


def list_checkpoints(output_dir):
    """Paths of the complete checkpoints in ``output_dir``, oldest first."""
    if not os.path.isdir(output_dir):
        return []
    names = [name for name in os.listdir(output_dir)
             if _NAME.fullmatch(name) and os.path.isfile(os.path.join(output_dir, name, _STATE, "state.json"))]
    return [os.path.join(output_dir, name) for name in sorted(names, key=lambda name: int(name[11:]))]


def restore(path, trainer, info):
    """Bring ``trainer`` to the state saved at ``path``, bit for bit.

    Args:
        path (str): a checkpoint directory.
        trainer (Trainer): of the same model and dtype; its weights are overwritten in place.
        info (dict): as given to `save_training_checkpoint`; each value must be the same.

    Raises:
        InputError: files are broken, or belong to another run; the message names the difference.
    """
    state = os.path.join(path, _STATE)
    try:
        with open(os.path.join(state, "state.json"), encoding="utf-8") as file:
            saved = json.load(file)
    except (OSError, ValueError) as error:
        raise InputError(f"{state}/state.json cannot be read ({error}); resume from another checkpoint") from None
    for key, value in info.items():
        if saved.get(key) != value:
            raise InputError(f"{path} was written with {key} {saved.get(key)!r}, this run has {value!r}; "
                             "to resume, leave it unchanged")
    reader = CheckpointReader(path)
    parameters = {parameter.name: parameter for parameter in trainer.model.get_parameters()}
    reader.check({name: parameter.shape for name, parameter in parameters.items()})
    for name, parameter in parameters.items():
        parameter.data.copy_(Tensor.from_numpy(reader.read(name)))
    tensors = trainer.optimizer.state()
    file = os.path.join(state, "rank-00000.safetensors")
    try:
        with safe_open(file, "np") as stored:
            lacking = sorted(set(tensors) ^ set(stored.keys()))
            if lacking:
                raise InputError(f"{file} does not fit this run: {lacking[0]} is in one and not in the other")
            for name, tensor in tensors.items():
                value = stored.get_tensor(name)
                if value.shape != tensor.shape:
                    raise InputError(f"{file}: {name} has shape {value.shape}, not {tensor.shape}")
                tensor.copy_(Tensor.from_numpy(value))
    except (OSError, SafetensorError) as error:
        raise InputError(f"{file} cannot be read ({error}); resume from another checkpoint") from None
    trainer.step = saved["step"]
    trainer.optimizer.updates = saved["updates"]


def _flush(path, deep=True):
    """fsync a directory, and with ``deep`` every file below it, so that a rename never outruns the data."""
    for folder, _, files in os.walk(path) if deep else [(path, [], [])]:
        for name in [*files, ""]:
            handle = os.open(os.path.join(folder, name), os.O_RDONLY)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)
