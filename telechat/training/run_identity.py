"""Whether a checkpoint is of the same run as the one that is to go on from it, and all processes are of one run."""

from telechat.content import first_difference
from telechat.data.packed_dataset import same_data
from telechat.errors import InputError
from telechat.fields import shown


def check_same_run(path, saved, now):
    """Refuse to go on from a checkpoint of another run.

    Args:
        path (str): of the checkpoint.
        saved (dict): its ``state.json``.
        now (dict): what must be the same, as it was given to `save_training_checkpoint`.

    Raises:
        InputError: names the first value that differs, as it is there and here.
    """
    for key, value in now.items():
        if key == "data" and isinstance(saved.get(key), dict) and same_data(saved[key], value):
            continue
        difference = first_difference(key, saved.get(key), value)
        if difference:
            name, before, here = difference
            raise InputError(f"{path} was written with {name} {shown(before)}, this run has {shown(here)}; "
                             "to resume, leave it unchanged")


def check_agreement(mine, first, rank):
    """Refuse to start where rank ``rank`` has another configuration, code, model or dataset than rank 0."""
    different = [name for name in mine if mine[name] != first[name]]
    if different:
        raise InputError(f"rank {rank} has another {different[0]} than rank 0; "
                         "start every process with the same command, code and files")
