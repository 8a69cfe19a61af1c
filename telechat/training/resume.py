"""Which checkpoint a run goes on from, and what becomes of later ones."""

import os
import shutil
import sys

from telechat.errors import InputError
from telechat.training.training_state import check_whole, is_checkpoint, list_checkpoints

_SET_ASIDE = ".set-aside"


def find_checkpoint(output_dir, resume=False, resume_from=None, warn=True):
    """The checkpoint to go on from; None for a new run.

    The newest one counts that is whole: one that a crash, a full disk or a copy damaged is passed over with a warning.

    Args:
        output_dir (str): of the run.
        resume (bool): go on from what is there.
        resume_from (str): a checkpoint to go on from, and no other.
        warn (bool): print those warnings.

    Raises:
        InputError: there is none, or none is whole, or there is one and the run is to be a new one.
    """
    found = list_checkpoints(output_dir)
    if resume_from is not None:
        path = os.path.realpath(resume_from)
        if not is_checkpoint(path):
            raise InputError(f"--resume_from {resume_from}: is no checkpoint of a training run (it holds no "
                             "training_state/state.json); give a directory such as checkpoint-000500")
        if found and os.path.dirname(path) != os.path.realpath(output_dir):
            raise InputError(f"{output_dir} holds checkpoints of another run than --resume_from {resume_from}; "
                             "give another output_dir")
        check_whole(path)
        return path
    if resume and not found:
        raise InputError(f"--resume: {output_dir} holds no checkpoint; start without --resume")
    if not resume:
        if found:
            raise InputError(f"{output_dir} holds checkpoints of an earlier run; "
                             "go on with --resume, or give another output_dir")
        return None
    reasons = []
    for path in reversed(found):
        try:
            check_whole(path)
        except InputError as error:
            reasons.append(str(error))
            continue
        if warn:
            for reason in reasons:
                print(f"warning: {reason}: passed over; the run goes on from {path}", file=sys.stderr, flush=True)
        return path
    raise InputError(f"--resume: no checkpoint in {output_dir} is whole ({reasons[0]}); start without --resume in another "
                     "output_dir, or give --resume_from a copy that is")


def set_later_aside(output_dir, step):
    """Rename checkpoints of steps after ``step``, which a run that goes on from there does again; returns their new paths.

    They would be taken for its newest ones. Where ``final`` is a link to one, it is one afterwards.
    """
    renamed = []
    for path in list_checkpoints(output_dir):
        if int(os.path.basename(path)[11:]) <= step:
            continue
        target = path + _SET_ASIDE
        if os.path.isdir(target):
            shutil.rmtree(target)
        os.rename(path, target)
        final = os.path.join(output_dir, "final")
        if os.path.islink(final) and os.readlink(final) == os.path.basename(path):
            os.remove(final)
            os.symlink(os.path.basename(target), final)
        renamed.append(target)
    return renamed
