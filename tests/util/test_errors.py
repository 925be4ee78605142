"""What an error message never shows."""

import pytest

from har.util.errors import UserError, first_line


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("at http://ana:pw@host:5000/x, or", "at http://host:5000/x, or"),
        ("https://ana:p@w@host and http://b:c@d", "https://host and http://d"),
        ("postgresql://ana@host/har", "postgresql://host/har"),
        ("http://host/a@b", "http://host/a@b"),
        ("/mnt//me@home/image.jpg", "/mnt//me@home/image.jpg"),
    ],
)
def test_no_message_shows_a_password(text: str, shown: str) -> None:
    assert str(UserError(text)) == first_line(OSError(text)) == shown
