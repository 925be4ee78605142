"""`python -m har`: the same as the command `har`."""

import sys

if __name__ == "__main__":
    try:
        from har.cli.main import main

        main()
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
