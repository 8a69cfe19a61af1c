"""Training checkpoints: a model directory plus what the optimizer needs to go on, on any mesh.

A checkpoint is ``checkpoint-NNNNNN`` in the run's output directory: a loadable model, with a
folder ``training_state`` inside; of a run that trains an adapter it is the adapter, as the peft package saves it.
There every process has written the moments (and master weights)
that it holds, with their place in the whole tensors, so that any other mesh finds what it needs. A
checkpoint appears under its name only when it is complete.
"""

import json
import os
import re
import shutil

import numpy as np
from mindspore import Tensor
from safetensors import SafetensorError
from safetensors.numpy import save_file

from telechat import fields
from telechat.adapters.directory import check_adapter_files, write_adapter
from telechat.checkpoint.layout import parameter_shapes
from telechat.checkpoint.reader import CheckpointReader
from telechat.checkpoint.shared_writer import SharedWriter
from telechat.checkpoint.writer import copy_extra_files
from telechat.errors import InputError
from telechat.parallel.collectives import barrier
from telechat.parallel.plan import cut_axis
from telechat.progress import Progress, track
from telechat.text_files import read_json_object
from telechat.training.run_identity import check_same_run
from telechat.training.state_files import StateFiles

_NAME = re.compile(r"checkpoint-(\d{6,})")
_STATE = "training_state"


def save_training_checkpoint(output_dir, trainer, info, extra_from=None, tokenizer=None, keep=2):
    """Write ``checkpoint-NNNNNN`` for the trainer's step and drop the oldest beyond ``keep``.

    Every process of the run calls it.

    Args:
        output_dir (str): the run's directory, the same for all processes.
        trainer (Trainer): model, moments and counters are saved.
        info (dict): what resuming must find unchanged (see `restore`).
        extra_from (str): directory whose tokenizer and generation_config.json go along; of an adapter its model's.
        tokenizer (Tokenizer): its files go along in place of those.
        keep (int): how many checkpoints stay.

    Returns:
        str: the checkpoint's path.

    Raises:
        InputError: the directory cannot be written; earlier checkpoints stay as they are.
    """
    path = os.path.join(output_dir, f"checkpoint-{trainer.step:06d}")
    partial = os.path.join(output_dir, f".checkpoint-{trainer.step:06d}.partial")
    stage, world = trainer.stage, trainer.mesh.world
    lead = world.rank == 0
    try:
        writer = None if trainer.adapter else SharedWriter(partial, stage.config, str(stage.dtype).lower())
        if lead:
            os.makedirs(output_dir, exist_ok=True)
            for name in os.listdir(output_dir):  # what a killed save left
                if name.startswith(".checkpoint-") and name.endswith(".partial"):
                    shutil.rmtree(os.path.join(output_dir, name))
            os.makedirs(os.path.join(partial, _STATE))
            if writer is not None:
                writer.create()
                copy_extra_files(extra_from, partial)
                if tokenizer is not None:
                    tokenizer.save(partial)
        barrier(world)
        if writer is not None:
            _write_parameters(writer, trainer)
        _write_state(os.path.join(partial, _STATE, f"rank-{world.rank:05d}.safetensors"), trainer)
        barrier(world)
        if lead:
            if trainer.adapter:
                _write_adapter(partial, trainer.adapter, extra_from)
            values = {"step": trainer.step, "updates": trainer.optimizer.updates, **info}
            if trainer.adapter:
                values["adapter_shapes"] = trainer.adapter.shapes
            if trainer.loss_scale is not None:
                values["loss_scale"] = [trainer.loss_scale.value, trainer.loss_scale.good_steps]
            with open(os.path.join(partial, _STATE, "state.json"), "w", encoding="utf-8") as file:
                json.dump(values, file, indent=1)
            _flush(partial)
            shutil.rmtree(path, ignore_errors=True)
            os.rename(partial, path)
            _flush(output_dir, deep=False)
            for old in list_checkpoints(output_dir)[:-keep]:
                _remove(old)
        barrier(world)
    except (OSError, SafetensorError, InputError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        reason = getattr(error, "strerror", None) or error
        again = "then go on with --resume" if list_checkpoints(output_dir) else "then start again"
        raise InputError(f"checkpoint {path} cannot be written ({reason}); "
                         f"free space or give another output_dir, {again}") from None
    return path


def _write_parameters(writer, trainer):
    """Each part once: by the first data-parallel rank, and what all tensor ranks hold by the first of them."""
    stage, mesh = trainer.stage, trainer.mesh
    for name, parameter in track(stage.parameters.items(), "saving weights", "tensors"):
        if mesh.data.rank == 0 and _is_owner(name, stage, mesh):
            slices = stage.slices[name]
            rows = slices[0].stop - slices[0].start
            writer.write(name, slices, parameter.asnumpy()[:rows])


def _write_adapter(path, adapter, base):
    """The whole adapter, put together of what every process has written."""
    with StateFiles(os.path.join(path, _STATE)) as stored:
        def read(name):
            value = np.zeros(adapter.shapes[name], np.float32)
            stored.read_into(value, f"weight.{name}", [[0, length] for length in value.shape])
            return value

        write_adapter(path, adapter.config, adapter.lora, read, base)


def _is_owner(name, stage, mesh):
    if mesh.tensor.rank > 0 and cut_axis(name) is None:
        return False
    # The last stage holds a tied embedding as its head; the first one's counts.
    return stage.first or not name.endswith("word_embeddings.weight")


def _state_box(name, trainer):
    """Where the optimizer's state of a parameter lies in the whole tensor: (start, stop) for each axis."""
    rows, *others = trainer.trained.slices[name]
    own = trainer.optimizer.own_rows(trainer.trained.parameters[name])
    # Rows that only fill the vocabulary up are no part of the tensor.
    start, stop = (min(rows.start + edge, rows.stop) for edge in (own.start, own.stop))
    return [[start, stop], *([part.start, part.stop] for part in others)]


def _write_state(path, trainer):
    """The optimizer's tensors held by this process, and an adapter's own, unless another holds the same."""
    stage, mesh, optimizer = trainer.stage, trainer.mesh, trainer.optimizer
    tensors, boxes = {}, {}
    for key, tensor in {**optimizer.state(), **_adapter_weights(trainer)}.items():
        name = key.partition(".")[2]
        cut = optimizer.is_cut(trainer.trained.parameters[name])
        if (mesh.data.rank == 0 or cut) and _is_owner(name, stage, mesh):
            box = _state_box(name, trainer)
            tensors[key] = tensor.asnumpy()[:box[0][1] - box[0][0]]
            boxes[key] = box
    with Progress("saving the optimizer's state"):
        save_file(tensors, path, metadata={"boxes": json.dumps(boxes)})


def _adapter_weights(trainer):
    """The rows of an adapter's tensors whose state is held here, as ``weight.NAME``."""
    if trainer.adapter is None:
        return {}
    return {f"weight.{name}": parameter.data[trainer.optimizer.own_rows(parameter)]
            for name, parameter in trainer.adapter.parameters.items()}


def list_checkpoints(output_dir):
    """Paths of the complete checkpoints in ``output_dir``, oldest first."""
    if not os.path.isdir(output_dir):
        return []
    names = [name for name in os.listdir(output_dir)
             if _NAME.fullmatch(name) and is_checkpoint(os.path.join(output_dir, name))]
    return [os.path.join(output_dir, name) for name in sorted(names, key=lambda name: int(name[11:]))]


def is_checkpoint(path):
    """Whether a directory is a checkpoint of training, whole or damaged."""
    return os.path.isfile(os.path.join(path, _STATE, "state.json"))


def check_whole(path):
    """Look through a checkpoint as far as that is possible without reading its tensors.

    Raises:
        InputError: a file is missing, cut short or no such file, or the moments of a parameter are not all there.
    """
    folder = os.path.join(path, _STATE)
    shapes = _read_state(folder).get("adapter_shapes")
    if shapes is None:
        reader = CheckpointReader(path)
        shapes = parameter_shapes(reader.config)
        reader.check(shapes)
    else:
        check_adapter_files(path)
    with StateFiles(folder) as stored:
        stored.check_complete(shapes)


def _read_state(folder):
    state = read_json_object(os.path.join(folder, "state.json"), "resume from another checkpoint")
    for name in ("step", "updates"):
        fields.whole_number(f"{folder}/state.json: {name}", state.get(name))
    return state


def _remove(path):
    """Delete a checkpoint; whenever that is cut short, what is left no longer has a checkpoint's name."""
    folder, name = os.path.split(path)
    partial = os.path.join(folder, f".{name}.partial")  # the next save clears it away
    os.rename(path, partial)
    shutil.rmtree(partial)


def restore(path, trainer, info):
    """Bring ``trainer`` to the state saved at ``path``; bit for bit where the mesh is the same.

    Args:
        path (str): a checkpoint directory.
        trainer (Trainer): of the same model and dtype, on any mesh; its weights are overwritten.
        info (dict): as given to `save_training_checkpoint`; each value must be the same.

    Raises:
        InputError: files are broken, lack a part, or belong to another run; the message says which.
    """
    folder = os.path.join(path, _STATE)
    saved = _read_state(folder)
    check_same_run(path, saved, info)
    if trainer.adapter is None:
        _restore_parameters(CheckpointReader(path), trainer.stage)
    with StateFiles(folder) as stored:
        if trainer.adapter is not None:
            for name, parameter in trainer.adapter.parameters.items():
                value = np.zeros(parameter.shape, np.float32)
                stored.read_into(value, f"weight.{name}", [[part.start, part.stop] for part in trainer.adapter.slices[name]])
                parameter.data.copy_(Tensor.from_numpy(value))
        for key, tensor in trainer.optimizer.state().items():
            value = np.zeros(tensor.shape, np.float32)
            box = _state_box(key.partition(".")[2], trainer)
            stored.read_into(value[:box[0][1] - box[0][0]], key, box)
            tensor.copy_(Tensor.from_numpy(value))
    trainer.optimizer.take_masters()
    trainer.step = saved["step"]
    trainer.optimizer.updates = saved["updates"]
    if trainer.loss_scale is not None and "loss_scale" in saved:
        trainer.loss_scale.value, trainer.loss_scale.good_steps = saved["loss_scale"]


def _restore_parameters(reader, stage):
    for name, parameter in stage.parameters.items():
        value = np.zeros(parameter.shape, reader.dtype(name))
        part = reader.read(name, stage.slices[name])
        value[:len(part)] = part
        parameter.data.copy_(Tensor.from_numpy(value))


def _flush(path, deep=True):
    """fsync a directory, and with ``deep`` every file below it, so that a rename never outruns the data."""
    for folder, _, files in os.walk(path) if deep else [(path, [], [])]:
        for name in [*files, ""]:
            handle = os.open(os.path.join(folder, name), os.O_RDONLY)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)
