"""The command `har`: all its commands, and how each of them ends.

Commands import heavy packages inside their functions, so that `har --help` answers at once.
"""

import errno
import gc
import sys
from collections.abc import Sequence
from io import TextIOWrapper
from pathlib import Path
from tempfile import gettempdir
from typing import Any, NoReturn

import click

from har import __version__
from har.cli import data, models, runs, studies, training
from har.cli.options import with_dashes
from har.util.errors import UserError, first_line
from har.util.files import cache_folder
from har.util.progress import say, show
from har.util.signals import insist_on_signals, stop_on_signals

# A network and its graph are hundreds of thousands of Python objects that live to the end. Python
# would scan them after every 700 new ones, which takes a quarter of the time to build them.
OBJECTS_BETWEEN_COLLECTIONS = 50_000
# A full disk, a folder without permission, too little memory: for the user to mend, not a bug.
REFUSALS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOMEM}


class Commands(click.Group):
    """A group that reports a user's mistake in one line and exits with 2."""

    def main(self, *args: Any, **options: Any) -> NoReturn:
        """Run the command. Only bugs of ours end with a stack trace."""
        stop_on_signals()
        gc.set_threshold(OBJECTS_BETWEEN_COLLECTIONS)
        if isinstance(sys.stdout, TextIOWrapper):
            # as on stderr: a terminal that is not UTF-8 shows `\\u65e5` for a letter that it lacks
            sys.stdout.reconfigure(errors="backslashreplace")
        status = 0
        try:
            # click returns a status for --help and --version, and None for a command
            with insist_on_signals():
                status = super().main(*args, **{**options, "standalone_mode": False}) or 0
        except click.exceptions.NoArgsIsHelpError as error:
            show(error.format_message())
        except (click.ClickException, UserError, OSError) as error:
            if isinstance(error, OSError) and error.errno not in REFUSALS:
                raise
            first, *listed = _describe_mistake(error)
            say(f"error: {first}", *listed)
            status = 2
        except (KeyboardInterrupt, click.Abort):
            say("", "stopped")
            status = 130
        sys.exit(status)


def _describe_mistake(error: click.ClickException | UserError | OSError) -> Sequence[str]:
    if isinstance(error, click.ClickException):
        # click lists the values of an argument in several lines
        return [" ".join(error.format_message().split())]
    if isinstance(error, UserError):
        return error.args
    if error.filename:
        return [first_line(error)]
    # the system does not say which disk is full
    folders = f"{Path.cwd()}, {cache_folder()} (HAR_CACHE) and {gettempdir()} (TMPDIR)"
    return [f"{error.strerror}; har writes into {folders}"]


@click.group(
    cls=Commands, context_settings={"token_normalize_func": with_dashes, "show_default": True}
)
@click.version_option(__version__, prog_name="har")
def main() -> None:
    """Recognise human actions in photographs: train, compare and serve, recorded in MLflow.

    \b
    har run                             train and evaluate on a drawn sample
    har run --variant v5 --data DIR     the same on your images; v5 is the fastest without a GPU
    har variants                        which variants there are
    har COMMAND --help                  every option
    """


for group in (data, training, studies, models, runs):
    for command in group.COMMANDS:
        main.add_command(command)
