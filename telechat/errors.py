"""What people see as a sentence instead of a traceback."""


class InputError(ValueError):
    """Something the caller supplied is wrong.

    The message is one sentence that names the file, field or flag and says what to do;
    the command-line tools print it and exit with status 2.
    """


def describe_error(error):
    """The sentence of an `InputError`; of an OSError the file and what the system says of it."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return str(error)
