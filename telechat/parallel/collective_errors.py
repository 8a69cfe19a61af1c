"""Refusing bad input once, whatever the number of processes."""

import time

from telechat.errors import InputError, describe_error
from telechat.parallel.collectives import gather_objects


def run_on_all(action, world):
    """``action()`` on every process; where some refuse their input, all end and the first of them says why.

    The action must not communicate, since a process that refuses would leave the others waiting.

    Args:
        action (callable): takes nothing.
        world (Group): all processes of the run.

    Returns:
        What ``action()`` returned here.

    Raises:
        InputError: as raised here, and no process before this one raised it; also for a file that the system
            refuses (OSError).
        SystemExit: with status 2, where another process reports.
    """
    result = refusal = None
    try:
        result = action()
    except (InputError, OSError) as error:
        if world.size == 1:
            raise
        refusal = describe_error(error)
    refusals = gather_objects(refusal, world)
    speaker = next((rank for rank, text in enumerate(refusals) if text is not None), None)
    if speaker is None:
        return result
    if speaker == world.rank:
        raise InputError(refusal)
    # msrun ends all processes once the first has ended: the one that reports must come to it.
    time.sleep(2)
    raise SystemExit(2)
