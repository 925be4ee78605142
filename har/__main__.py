"""`python -m har`: the same as the command `har`."""

from har.cli.main import main

if __name__ == "__main__":
    main()
