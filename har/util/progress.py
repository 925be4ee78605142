"""Progress and messages on stderr: a progress bar on a terminal, plain lines elsewhere."""

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
    """Show `label` and how many of `total` steps are done; yield a function `advance(steps)`.

    `brief` removes the bar at the end, for a caller that prints its own last line.
    """
    if sys.stderr.isatty():
        with click.progressbar(
            length=total, label=label, file=sys.stderr, show_pos=True, width=24
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
            say(f"{label}: {done:,} of {total:,}")

    yield advance
    if not brief:
        say(f"{label}: {done:,} of {total:,}")


def say(message: str) -> None:
    """Print one line to stderr; stdout is for results."""
    # a full disk behind a redirected stderr must not stop the work
    with suppress(OSError):
        click.echo(message, err=True)


def warn(message: str) -> None:
    """Print a warning to stderr: the command continues, but not exactly as requested."""
    with suppress(OSError):
        click.secho(f"warning: {message}", err=True, fg="yellow")


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
