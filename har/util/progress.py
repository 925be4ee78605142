"""Results on stdout; progress and messages on stderr, with a progress bar on a terminal.

No control character of a foreign name reaches the terminal.
"""

import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import click

from har.util.errors import without_password
from har.util.escaping import for_terminal

PLAIN_LINE_EVERY_S = 10.0


@dataclass
class _State:
    """`fleeting` keeps progress only while it lasts, and hides other messages."""

    fleeting: bool = False


_STATE = _State()


@contextmanager
def only_progress() -> Iterator[None]:
    """Show, during the block, progress alone, and no trace of it afterwards; warnings stay."""
    before, _STATE.fleeting = _STATE.fleeting, True
    try:
        yield
    finally:
        _STATE.fleeting = before


@contextmanager
def progress(label: str, total: int, *, brief: bool = False) -> Iterator[Callable[[int], None]]:
    """Show `label` and how many of `total` steps are done; yield a function `advance(steps)`.

    `brief` removes the bar at the end, for a caller that prints its own last line.
    """
    brief = brief or _STATE.fleeting
    if sys.stderr.isatty():
        with click.progressbar(
            length=total, label=for_terminal(label), file=sys.stderr, show_pos=True, width=24
        ) as bar:
            yield bar.update
        if brief:
            # move the cursor up one line and clear it
            click.echo("\x1b[1A\x1b[2K", err=True, nl=False)
        return
    done, last = 0, time.monotonic()

    def advance(steps: int) -> None:
        nonlocal done, last
        done += steps
        if time.monotonic() - last >= PLAIN_LINE_EVERY_S and done < total:
            last = time.monotonic()
            _print(f"{label}: {done:,} of {total:,}")

    yield advance
    if not brief:
        say(f"{label}: {done:,} of {total:,}")


def say(*lines: str) -> None:
    r"""Print lines to stderr; stdout is for results. A line break inside a line becomes `\n`."""
    if not _STATE.fleeting:
        _print(*lines)


def _print(*lines: str) -> None:
    # a full disk behind a redirected stderr must not stop the work
    with suppress(OSError):
        click.echo("\n".join(for_terminal(without_password(each)) for each in lines), err=True)


def warn(message: str) -> None:
    """Print a warning to stderr: the command continues, but not exactly as requested."""
    with suppress(OSError):
        click.secho(f"warning: {for_terminal(without_password(message))}", err=True, fg="yellow")


def show(text: object) -> None:
    """Print a result to stdout. Its line breaks stay, so names in it must be escaped before."""
    click.echo("\n".join(map(for_terminal, str(text).split("\n"))))


@contextmanager
def quiet_loading() -> Iterator[None]:
    """Hide what is printed to stderr in the block, unless the block raises.

    TensorFlow's C++ code prints while it is imported, before any log level takes effect.
    """
    sys.stderr.flush()
    terminal = os.dup(2)
    with tempfile.TemporaryFile() as hidden:
        os.dup2(hidden.fileno(), 2)
        try:
            yield
        except BaseException:
            hidden.seek(0)
            os.write(terminal, hidden.read())
            raise
        finally:
            os.dup2(terminal, 2)
            os.close(terminal)
