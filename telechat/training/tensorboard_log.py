"""TensorBoard event files, by tensorboard's own writer."""

import os
import time

from telechat.errors import InputError


class TensorBoardLog:
    """Writes scalars to ``tensorboard/`` in the output directory.

    Args:
        output_dir (str): of the run.

    Raises:
        InputError: tensorboard is not installed.
    """

    def __init__(self, output_dir):
        check_installed()
        from tensorboard.compat.proto import event_pb2, summary_pb2
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self._event, self._summary = event_pb2.Event, summary_pb2.Summary
        self._writer = EventFileWriter(os.path.join(output_dir, "tensorboard"))

    def write(self, record):
        """Write the numbers of one line of ``metrics.jsonl`` but its step and time."""
        values = [self._summary.Value(tag=name, simple_value=float(value)) for name, value in record.items()
                  if name not in ("step", "time")]
        self._writer.add_event(self._event(step=record["step"], wall_time=record.get("time", time.time()),
                                           summary=self._summary(value=values)))

    def close(self):
        """Write out what is held back."""
        self._writer.close()


def check_installed():
    """InputError unless tensorboard can be imported."""
    try:
        import tensorboard.summary.writer.event_file_writer  # noqa: F401
    except ImportError:
        raise InputError("--tensorboard needs tensorboard; pip install 'telechat[tensorboard]'") from None
