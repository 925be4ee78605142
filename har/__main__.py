"""`python -m har` and the command `har`."""

import atexit
import gc
import sys


def run() -> None:
    """Run the command line; a Ctrl-C while it is loaded ends with one line too."""
    # Python looks through all objects once more as it ends: two seconds after a training
    atexit.register(gc.freeze)
    try:
        from har.cli.main import main

        main()
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        sys.exit(130)
    except ModuleNotFoundError as error:
        # a missing module of this package is a bug of ours and keeps its trace
        if (error.name or "har").partition(".")[0] == "har":
            raise
        print(
            f"error: {sys.executable} has no package {error.name}: run `make setup` in the folder"
            " of this project, then `. .venv/bin/activate`",
            file=sys.stderr,
        )
        sys.exit(2)


if __name__ == "__main__":
    run()
