"""What every command-line tool shares: errors become one sentence and exit status 2."""

import argparse
import sys

from telechat.errors import InputError
from telechat.version import check_mindspore


class ArgumentParser(argparse.ArgumentParser):
    """argparse with full flag names only, so that a typo never passes as an abbreviation."""

    def __init__(self, *args, **kwargs):
        kwargs.setdefault("allow_abbrev", False)
        kwargs.setdefault("formatter_class", argparse.ArgumentDefaultsHelpFormatter)
        super().__init__(*args, **kwargs)

    def error(self, message):
        """One sentence, as for any other bad input."""
        self.exit(2, f"error: {message}; {self.prog} --help lists the flags\n")


def run(main):
    """Run ``main()`` and exit: 0, or its return value, or 2 with one sentence on bad input."""
    try:
        check_mindspore()
        status = main()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        status = 2
    except BrokenPipeError:
        # The reader of our output went away (``| head``); nothing is wrong with the run.
        sys.stderr.close()
        status = 0
    except OSError as error:
        name = f"{error.filename}: " if error.filename else ""
        print(f"error: {name}{error.strerror or error}", file=sys.stderr)
        status = 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        status = 130
    sys.exit(status or 0)
