"""How long work shows that it is alive: a bar on a terminal, plain lines elsewhere."""

import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import click

PLAIN_LINE_EVERY_S = 10.0


@contextmanager
def progress(label: str, total: int, *, brief: bool = False) -> Iterator[Callable[[int], None]]:
    """Yield `advance(steps)`; shows `label` and how many of `total` are done, on stderr.

    `brief`: the caller says itself how it ended, so the bar or the last line goes away.
    """
    if sys.stderr.isatty():
        with click.progressbar(
            length=total, label=label, file=sys.stderr, show_pos=True, width=24
        ) as bar:
            yield bar.update
        if brief:
            # up one line, and clear it
            click.echo("\x1b[1A\x1b[2K", err=True, nl=False)
        return
    done, last = 0, time.monotonic()

    def advance(steps: int) -> None:
        nonlocal done, last
        done += steps
        if time.monotonic() - last >= PLAIN_LINE_EVERY_S and done < total:
            last = time.monotonic()
            say(f"{label}: {done:,} of {total:,}")

    yield advance
    if not brief:
        say(f"{label}: {done:,} of {total:,}")


def say(message: str) -> None:
    """One line for the person watching, on stderr: stdout is for results."""
    # a log on a full disk: work goes on unwatched
    with suppress(OSError):
        click.echo(message, err=True)


def warn(message: str) -> None:
    """One line about something that still works, but not as asked."""
    with suppress(OSError):
        click.secho(f"warning: {message}", err=True, fg="yellow")


@contextmanager
def quiet_loading() -> Iterator[None]:
    """TensorFlow's C++ side talks on stderr while it is imported, before any log level counts.

    What was said is shown only if the import fails.
    """
    sys.stderr.flush()
    terminal = os.dup(2)
    with tempfile.TemporaryFile() as said:
        os.dup2(said.fileno(), 2)
        try:
            yield
        except BaseException:
            said.seek(0)
            os.write(terminal, said.read())
            raise
        finally:
            os.dup2(terminal, 2)
            os.close(terminal)
