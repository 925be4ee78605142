"""Errors whose message is meant for the user."""

import re


class UserError(ValueError):
    """A mistake in the data, the options or the environment that the user can correct.

    The message is one line: what is wrong, the value received, and what is allowed or what to
    do. The command line prints it without a stack trace and exits with 2.
    """

    def __init__(self, message: str) -> None:
        """Keep the message without the passwords of the addresses in it."""
        super().__init__(without_password(message))


def first_line(error: Exception) -> str:
    """Return the first line of an exception's message, or its class name; no passwords."""
    return without_password((str(error).splitlines() or [type(error).__name__])[0])


def without_password(text: str) -> str:
    """Remove user and password from addresses: `http://user:password@host` to `http://host`."""
    # a slash in a password is written %2F in an address
    return re.sub(r"(?<=://)[^/\s]*@", "", text)
