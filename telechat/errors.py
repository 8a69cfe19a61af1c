"""The one exception that people see as a sentence instead of a traceback."""


class InputError(ValueError):
    """Something the caller supplied is wrong.

    The message is one sentence that names the file, field or flag and says what to do;
    the command-line tools print it and exit with status 2.
    """
