"""The one exception that means: the user can mend this."""

import re


class UserError(ValueError):
    """A mistake in the data, the options or the environment.

    The message is one line that names the value received and what is allowed or what to
    do. The command line prints it without a stack trace and exits with 2. It never holds the
    password of an address.
    """

    def __init__(self, message: str) -> None:
        """As any exception, but for passwords."""
        super().__init__(without_password(message))


class ChangedError(UserError):
    """A file is not the one that it was."""


def first_line(error: Exception) -> str:
    """The first line of an exception's text, or its kind where it has none; no passwords."""
    return without_password((str(error).splitlines() or [type(error).__name__])[0])


def without_password(text: str) -> str:
    """The text as it may be shown: `http://name:password@host` becomes `http://host`."""
    # in an address a slash within the password is written %2F
    return re.sub(r"(?<=://)[^/\s]*@", "", text)
