"""What an error message never shows, and how it is printed."""

import pickle

import click
import pytest
from click.testing import CliRunner

from har.cli.main import Commands
from har.util.errors import UserError, first_line


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("at http://ana:pw@host:5000/x, or", "at http://host:5000/x, or"),
        ("https://ana:p@w@host and http://b:c@d", "https://host and http://d"),
        ("postgresql://ana@host/har", "postgresql://host/har"),
        ("http://host/a@b", "http://host/a@b"),
        ("at http://u:p/q@host:5000/x", "at http://host:5000/x"),
        ("at http://u:p?q#r@host/x", "at http://host/x"),
        ("ftp://u:p/q/r@h and s3://u:/@h/b", "ftp://h and s3://h/b"),
        ("http://:pw@host/", "http://host/"),
        ("http://host/x?token=abc&n=1", "http://host/x?token=...&n=1"),
        ("https://h/?n=1&Access_Token=a%20b!", "https://h/?n=1&Access_Token=..."),
        ("postgresql://h/db?password=x", "postgresql://h/db?password=..."),
        ("mysql://u:p/w@h/db?passwd=x;pwd=y", "mysql://h/db?passwd=...;pwd=..."),
        ("https://a/b?X-Amz-Signature=0f&api_key=1", "https://a/b?X-Amz-Signature=...&api_key=..."),
        ("is it?token=5", "is it?token=..."),
        ("/mnt//me@home/image.jpg", "/mnt//me@home/image.jpg"),
    ],
)
def test_no_message_shows_a_password(text: str, shown: str) -> None:
    assert str(UserError(text)) == first_line(OSError(text)) == shown


def test_each_line_of_a_message_is_one_line_also_from_another_process() -> None:
    error = UserError("2 files\nerror: fake", "  a\x1b[31m", "  b\u202e")
    lines = ["2 files\\nerror: fake", "  a\\x1b[31m", "  b\\u202e"]
    assert str(error).splitlines() == lines
    assert str(pickle.loads(pickle.dumps(error))) == str(error)


def test_a_command_ends_with_the_lines_of_its_error() -> None:
    @click.group(cls=Commands)
    def main() -> None:
        pass

    @main.command()
    def fail() -> None:
        raise UserError("2 files:", "  a\nb", "  c")

    result = CliRunner().invoke(main, ["fail"])
    assert result.exit_code == 2
    assert result.stderr.splitlines() == ["error: 2 files:", "  a\\nb", "  c"]
