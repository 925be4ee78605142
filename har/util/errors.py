"""Errors whose message is meant for the user."""

import re

from har.util.escaping import for_terminal


class UserError(ValueError):
    """A mistake in the data, the options or the environment that the user can correct.

    The message is one line: what is wrong, the value received, and what is allowed or what to
    do. A list may follow it, in lines of its own. The command line prints it without a stack trace
    and exits with 2.
    """

    def __init__(self, message: str, *listed: str) -> None:
        r"""Keep the lines without passwords, and safe to print: a line break becomes `\n`."""
        super().__init__(*(for_terminal(without_password(each)) for each in (message, *listed)))

    def __str__(self) -> str:
        return "\n".join(self.args)


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
