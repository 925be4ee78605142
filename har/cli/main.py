"""The command `har`: its commands in one group, and how it ends.

Every heavy import is inside a command: `har --help` answers at once.
"""

import errno
import gc
import sys
from typing import Any, NoReturn

import click

from har import __version__
from har.cli import data, models, runs, training
from har.cli.options import with_dashes
from har.util.errors import UserError, first_line
from har.util.progress import say
from har.util.signals import handle_sigterm_as_ctrl_c

# A network and its graph are hundreds of thousands of Python objects that live to the end. Looking
# through them after every 700, as Python does, takes a quarter of the time they are made in.
OBJECTS_BETWEEN_COLLECTIONS = 50_000
# What the system says of a full disk, a folder that may not be read or written, and too little
# memory: no bug of ours wherever it is met.
REFUSALS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOMEM}


class Commands(click.Group):
    """A group that turns a user's mistake into one line and exit status 2."""

    def main(self, *args: Any, **options: Any) -> NoReturn:
        """Run the command; a mistake needs no stack trace, anything else is our bug."""
        handle_sigterm_as_ctrl_c()
        gc.set_threshold(OBJECTS_BETWEEN_COLLECTIONS)
        status = 0
        try:
            # --help and --version come back as a status, commands as None
            status = super().main(*args, **{**options, "standalone_mode": False}) or 0
        except click.exceptions.NoArgsIsHelpError as error:
            click.echo(error.format_message())
        except click.ClickException as error:
            say(f"error: {error.format_message()}")
            status = 2
        except UserError as error:
            say(f"error: {error}")
            status = 2
        except OSError as error:
            if error.errno not in REFUSALS:
                raise
            say(f"error: {first_line(error)}")
            status = 2
        except (KeyboardInterrupt, click.Abort):
            say("\nstopped")
            status = 130
        sys.exit(status)


@click.group(cls=Commands, context_settings={"token_normalize_func": with_dashes})
@click.version_option(__version__, prog_name="har")
def main() -> None:
    """Human action recognition from still images, as one MLflow-tracked experiment.

    \b
    har run                    the whole job; without data of yours, on a drawn sample
    har run --variant v4 --data DIR
    har variants               what the variants are
    """


for group in (data, training, models, runs):
    for command in group.COMMANDS:
        main.add_command(command)
