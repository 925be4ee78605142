"""The one exception that means: the user can mend this."""


class UserError(ValueError):
    """A mistake in the data, the options or the environment.

    The message is one line that names the value received and what is allowed or what to
    do. The command line prints it without a stack trace and exits with 2.
    """


def first_line(error: Exception) -> str:
    """The first line of an exception's text, or its kind where it has none."""
    return (str(error).splitlines() or [type(error).__name__])[0]
