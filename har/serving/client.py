"""A client of a model server, `mlflow models serve`."""

import base64
import json
import math
import time
from collections.abc import Iterator, Sequence
from typing import Any
from urllib.parse import urlsplit

import requests
import urllib3

from har.inference.classifier import TOP_K, Guess, Prediction, explain_failure
from har.util.errors import UserError, without_password

# Enough for a server that is still warming up, or a slow one with many photographs.
TIMEOUT_S = 120
# Of base64 in a request. docker/nginx.conf lets 36 MB through.
MAX_BATCH_BYTES = 30_000_000
MAX_BATCH_IMAGES = 32
# An answer for an image has some 300 bytes.
MAX_ANSWER_BYTES = 1_000_000
_TOO_LARGE = 413


def read_address(url: str) -> str:
    """Complete the address of a server, such as `localhost:5001`, with or without /invocations."""
    given = url.strip()
    address = given if "://" in given else f"http://{given}"
    try:
        parts = urlsplit(address)
        port = parts.port
    except ValueError:
        parts, port = None, None
    if parts is None or parts.scheme not in ("http", "https") or not parts.hostname or port == 0:
        raise UserError(
            f"--url must be a server's address such as http://127.0.0.1:5001; received {given}"
        )
    path = parts.path.rstrip("/").removesuffix("/invocations") + "/invocations"
    return parts._replace(path=path, fragment="").geturl()


def ask_server(url: str, files: Sequence[bytes]) -> Iterator[Prediction]:
    """Have a server classify images; yield the answers in order, as they come.

    Requests are split by bytes, and again where the server finds them too large.
    """
    address = read_address(url)
    with requests.Session() as session:
        waiting = list(_split_by_bytes(files))[::-1]
        while waiting:
            batch = waiting.pop()
            rows = _ask(session, address, batch)
            if rows is not None:
                yield from rows
            elif len(batch) > 1:
                middle = len(batch) // 2
                waiting += [batch[middle:], batch[:middle]]
            else:
                yield explain_failure(
                    f"{len(batch[0]):,} bytes, more than the server takes in a request"
                )


def _split_by_bytes(files: Sequence[bytes]) -> Iterator[list[bytes]]:
    batch: list[bytes] = []
    size = 0
    for data in files:
        more = 4 * math.ceil(len(data) / 3)
        if batch and (size + more > MAX_BATCH_BYTES or len(batch) == MAX_BATCH_IMAGES):
            yield batch
            batch, size = [], 0
        batch.append(data)
        size += more
    if batch:
        yield batch


def _ask(
    session: requests.Session, address: str, files: Sequence[bytes]
) -> list[Prediction] | None:
    """Return a row for each image; None if the request was too large."""
    rows = [[base64.b64encode(data).decode()] for data in files]
    body = json.dumps({"dataframe_split": {"columns": ["image"], "data": rows}})
    status, text = _post(session, address, body)
    if status == _TOO_LARGE:
        return None
    if status != requests.codes.ok:
        raise _no_classifier(address, f"status {status}{_message_of(text)}")
    try:
        answers = json.loads(text, parse_constant=_refuse_constant)["predictions"]
        if not isinstance(answers, list) or len(answers) != len(files):
            raise ValueError(f"not a list of {len(files)} predictions")
        return [_read_prediction(row) for row in answers]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        reason = str(error) if type(error) is ValueError else "not the JSON of predictions"
        raise _no_classifier(address, reason) from error


def _post(session: requests.Session, address: str, body: str) -> tuple[int, bytes]:
    """Send a request and read the answer, within bounds of bytes and time."""
    ends = time.monotonic() + TIMEOUT_S
    shown = without_password(address)
    headers = {"Content-Type": "application/json"}
    try:
        with session.post(
            address,
            data=body.encode(),
            headers=headers,
            timeout=TIMEOUT_S,
            stream=True,
            allow_redirects=False,
        ) as answer:
            if answer.is_redirect:
                raise _no_classifier(address, "it sends to another address, which is not followed")
            text = b""
            # as it arrives, one byte or many
            while piece := answer.raw.read1(65_536, decode_content=True):
                text += piece
                if len(text) > MAX_ANSWER_BYTES:
                    raise _no_classifier(
                        address, f"its answer has more than {MAX_ANSWER_BYTES:,} bytes"
                    )
                if time.monotonic() > ends:
                    raise UserError(f"no answer from {shown} within {TIMEOUT_S} s")
            return answer.status_code, text
    except UserError:
        raise
    # urllib3's own errors come from reading; ValueError, from an address that it cannot use
    except (requests.RequestException, OSError, ValueError, urllib3.exceptions.HTTPError) as error:
        raise UserError(f"no answer from {shown}: {type(error).__name__}") from error


def _message_of(text: bytes) -> str:
    """Return the message of an error in MLflow's form, in one line."""
    try:
        message = json.loads(text)["message"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return ""
    line = str(message).splitlines()[0] if isinstance(message, str) and message.strip() else ""
    return f": {line[:200]}" if line.isprintable() and line else ""


def _no_classifier(address: str, reason: str) -> UserError:
    return UserError(f"{without_password(address)} does not answer as a classifier: {reason}")


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON")


def _read_prediction(row: Any) -> Prediction:
    if not isinstance(row, dict):
        raise ValueError("a row is no object")
    error = row["error"]
    if error is not None:
        return explain_failure(_check_text(error))
    top = [_read_guess(each) for each in _check_list(row["top_3"])]
    return {**_read_guess(row), "top_3": top, "error": None}


def _check_list(value: Any) -> list[Any]:
    if not isinstance(value, list) or len(value) > TOP_K:
        raise ValueError(f"top_3 is no list of {TOP_K} or fewer")
    return value


def _check_text(value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise ValueError("a label or an error is no text")
    # a foreign server's text must not steer the terminal
    return "".join(each if each.isprintable() else " " for each in value[:500])


def _read_guess(row: Any) -> Guess:
    if not isinstance(row, dict):
        raise ValueError("a guess is no object")
    number = row["probability"]
    if isinstance(number, bool) or not isinstance(number, int | float) or not 0 <= number <= 1:
        raise ValueError("a probability is no number from 0 to 1")
    return {"label": _check_text(row["label"]), "probability": float(number)}
