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


# Names of an address' parameters whose values are secrets; the names may have more around them.
_SECRET = r"password|passwd|pwd|token|secret|signature|credential|api-?_?key|access-?_?key|sig|auth"
_QUERY = re.compile(rf"([?&;][\w.\-]*(?:{_SECRET})[\w.\-]*=)[^&;#\s'\"]*", re.IGNORECASE)
# User and password end with the last @ before a space; a password may hold any other character.
_USER = re.compile(r"(?<=://)[^\s@/]*(?::[^\s@]*|)@(?:[^\s@/?#]*@)*")


def without_password(text: str) -> str:
    """Remove user and password from addresses, `http://user:password@host` to `http://host`, and
    the values of parameters such as `?token=`.
    """
    return _QUERY.sub(r"\1...", _USER.sub("", text))
