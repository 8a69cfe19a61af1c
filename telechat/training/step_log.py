"""A file of JSON lines, one or more a step, that a resumed run carries on."""

import json
import os

from telechat.errors import InputError


class StepLog:
    """Records of a run, each with a key "step", in a file that holds them from the moment they are added.

    Args:
        path (str): of the file.
        first_step (int): where the run resumes; what an earlier process wrote of later steps, between its last
            checkpoint and its end, is dropped since these steps are done again. 0: a new run.

    Attributes:
        records (list of dict): what the file holds.

    Raises:
        InputError: the file cannot be written.
    """

    def __init__(self, path, first_step=0):
        self.path = path
        self.records = [record for record in _read(path) if record["step"] <= first_step] if first_step else []
        try:
            with open(path + ".partial", "w", encoding="utf-8") as file:
                file.writelines(map(_line, self.records))
            os.replace(path + ".partial", path)
        except OSError as error:
            raise InputError(f"{path} cannot be written ({error.strerror}); give another output_dir") from None

    def add(self, record):
        """Append a record."""
        self.records.append(record)
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(_line(record))


def _line(record):
    return json.dumps(record, ensure_ascii=False) + "\n"


def _read(path):
    """The records of an earlier process up to the first line that is none: a crash cuts the last one short, or leaves
    bytes in its place that nobody wrote."""
    records = []
    if os.path.exists(path):
        with open(path, "rb") as file:
            for line in file:
                try:
                    record = json.loads(line.decode("utf-8"))
                    step = record["step"]
                except (ValueError, TypeError, KeyError):
                    break
                if not isinstance(step, int):
                    break
                records.append(record)
    return records
