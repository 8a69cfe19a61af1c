"""What went wrong on a device, in one line for a verdict."""

import itertools
import re
import textwrap

LONGEST = 240  # characters
_CANN = "- Ascend Error Message:"


def summary(message):
    """An error of MindSpore in one line: its first paragraph, and behind it what CANN said, where it did."""
    lines = message.strip().splitlines()
    said = _paragraph(lines)
    if _CANN in lines:
        said += _paragraph(lines[lines.index(_CANN) + 1:])
    return textwrap.shorten(" ".join(said), LONGEST, placeholder=" …")


def last_error(output):
    """`summary` of what the last traceback in a process's output ends with, else its last line."""
    lines = output.splitlines()
    starts = [place for place, line in enumerate(lines) if re.match(r"([\w.]*(Error|Exception|UpdateLost)|error): ", line)]
    return summary("\n".join(lines[starts[-1]:] if starts else [line for line in lines if line.strip()][-1:]))


def _paragraph(lines):
    """The lines up to an empty one or a rule, from the first that is neither."""
    def ends(line):
        return not line.strip() or line.startswith("---")
    return list(itertools.takewhile(lambda line: not ends(line), itertools.dropwhile(ends, lines)))
