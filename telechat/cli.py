"""What every command-line tool shares: errors become one sentence and exit status 2."""

import argparse
import contextlib
import os
import signal
import sys
import tempfile
import traceback

from telechat.errors import InputError, describe_error
from telechat.lost_output import drop_lost_output
from telechat.text_files import expand_path
from telechat.version import check_mindspore

UNEXPECTED = "error: unexpected "  # how the line about a failure begins that is not the user's
TRACEBACK_FOLDER = "TELECHAT_TRACEBACK_FOLDER"  # variable that names where its traceback goes; unset: the temporary folder

# Variable with a path: a process whose work has ended well makes a file of that name and its rank. After that MindSpore
# 2.10 takes leave of the scheduler and may crash: its main thread frees a connection while another still reads from
# it (2 of 45 jobs on a machine busy with much else, none of 110 on one busy with these alone).
FINISHED = "TELECHAT_FINISHED"


class ArgumentParser(argparse.ArgumentParser):
    """argparse with full flag names only, so that a typo never passes as an abbreviation."""

    def __init__(self, *args, **kwargs):
        kwargs.setdefault("allow_abbrev", False)
        kwargs.setdefault("formatter_class", argparse.ArgumentDefaultsHelpFormatter)
        super().__init__(*args, **kwargs)

    def error(self, message):
        """One sentence, as for any other bad input."""
        self.exit(2, f"error: {message}; {self.prog} --help lists the flags\n")


def path_argument(text):
    """The type of a flag that takes a path: ~ and $NAME mean what they mean to a shell."""
    try:
        return expand_path(text)
    except InputError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def add_inference_flags(parser):
    """The flags of tools that load a model to answer: how it computes, whoever asks."""
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32",
                        help="of the weights in memory; bfloat16 on Ascend")
    parser.add_argument("--no_prefix_cache", action="store_true",
                        help="compute every prompt whole, also where the cache holds what it begins with")
    parser.add_argument("--speculate", type=int, default=0, metavar="K",
                        help="guess up to K tokens ahead from what was said before; the same answers, sooner where they "
                             "quote")
    parser.add_argument("--no_paged_attention", action="store_true",
                        help="on Ascend: decode on a plain cache, by portable operations")
    parser.add_argument("--ignore_memory", action="store_true", help="start though memory does not seem to suffice")


def replace_unknown_characters():
    """Let input and output replace what their encoding lacks: a half character typed, a 你 on a terminal of ASCII."""
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError, ValueError):  # none, of another kind, or read from already
            stream.reconfigure(errors="replace")


class _Terminated(SystemExit):
    """SIGTERM or SIGHUP came; its code is the exit status that shells give for one."""


@contextlib.contextmanager
def _cleaning_up_when_terminated():
    """SIGTERM and SIGHUP end a tool as Ctrl-C does, by an exception, so that what is half written goes; a second one at once.

    Once MindSpore has run an operator it answers Ctrl-C with a SIGTERM to its own process. In the processes of a job
    signals are left alone: they may wait for each other in MindSpore, where no exception reaches.
    """
    def terminate(number, frame):
        signal.signal(number, signal.SIG_DFL)
        raise _Terminated(128 + number)

    ours = []
    if "MS_ROLE" not in os.environ:
        for number in (signal.SIGTERM, signal.SIGHUP):
            # Under nohup SIGHUP is ignored and stays so; ValueError: not the main thread.
            with contextlib.suppress(ValueError):
                if signal.getsignal(number) == signal.SIG_DFL:
                    signal.signal(number, terminate)
                    ours.append(number)
    try:
        yield
    finally:
        for number in ours:
            if signal.getsignal(number) is terminate:
                signal.signal(number, signal.SIG_DFL)


def run(main):
    """Run ``main()`` and exit: 0, or its return value, or 2 with one sentence on bad input.

    Anything else that goes wrong is one line too, and exit status 1; its traceback goes to a file named there.
    `tools/launch.py` has the files of its processes beside their logs. Where the reader of the output goes away
    (``| head``), the tool ends with 0 and says nothing.
    """
    replace_unknown_characters()
    status = 0
    with contextlib.suppress(BrokenPipeError), _cleaning_up_when_terminated():
        status = _status(main)
        sys.stdout.flush()  # here and not at Python's exit, where a reader that is gone makes a page of complaint
    drop_lost_output()
    if not status and FINISHED in os.environ:
        with contextlib.suppress(OSError), open(f"{os.environ[FINISHED]}.{os.environ.get('RANK_ID')}", "w"):
            pass
    if "mindspore" not in sys.modules and any(name.startswith("mindspore.") for name in sys.modules):
        # Interrupted while it was imported: at the end of the process it would import the rest, and crash.
        os._exit(status or 0)
    sys.exit(status or 0)


def _status(main):
    """What ``main()`` comes to as an exit status, its failures told on stderr."""
    try:
        check_mindspore()
        return main()
    except BrokenPipeError:
        raise
    except SystemExit as ended:  # of argparse, after --help or a wrong flag; or of a signal
        if isinstance(ended, _Terminated):
            _say_interrupted()
        return ended.code
    except (InputError, OSError) as error:
        print(f"error: {describe_error(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        _say_interrupted()
        return 130
    except Exception as error:
        interrupted = _interrupt_behind(error)
        if interrupted:
            _say_interrupted()
            return interrupted
        reason = (str(error).strip().splitlines() or [""])[0]
        details = save_traceback()
        print(f"{UNEXPECTED}{type(error).__name__}: {reason[:300]} (details: {details})", file=sys.stderr)
        return 1


def _say_interrupted():
    with contextlib.suppress(OSError):  # a terminal that is gone
        print("interrupted", file=sys.stderr, flush=True)


def _interrupt_behind(error):
    """The exit status where a signal is behind an exception, else 0: a library being imported makes an ImportError of it."""
    while error is not None and not isinstance(error, (KeyboardInterrupt, _Terminated)):
        error = error.__cause__ or error.__context__
    return 0 if error is None else getattr(error, "code", 130)


def save_traceback():
    """Write the traceback of the exception being handled to a new file; returns its path, or in words where it is."""
    program = os.path.splitext(os.path.basename(sys.argv[0]))[0] or "telechat"
    text = traceback.format_exc()
    try:
        with tempfile.NamedTemporaryFile("w", prefix=f"{program}-error-", suffix=".txt", delete=False,
                                         dir=os.environ.get(TRACEBACK_FOLDER), encoding="utf-8",
                                         errors="backslashreplace") as file:
            file.write(f"{' '.join(sys.argv)}\n\n{text}")
        return file.name
    except OSError:
        print(text, end="", file=sys.stderr)
        return "above; no file can be written"
