"""A client of a model server, `mlflow models serve`."""

import base64
from collections.abc import Sequence
from typing import Any

import requests

from har.inference.classifier import Prediction
from har.util.errors import UserError, first_line

# Enough for a server that is still warming up, or a slow one with many photographs.
TIMEOUT_S = 120


def ask_server(url: str, files: Sequence[bytes]) -> list[Prediction]:
    """Have a server classify images; `url` may end in /invocations or not."""
    if not files:
        return []
    rows = [[base64.b64encode(data).decode()] for data in files]
    body: Any = {"dataframe_split": {"columns": ["image"], "data": rows}}
    address = url.rstrip("/").removesuffix("/invocations") + "/invocations"
    try:
        answer = requests.post(address, json=body, timeout=TIMEOUT_S)
    except requests.RequestException as error:
        raise UserError(f"no answer from {address}: {type(error).__name__}") from error
    try:
        answer.raise_for_status()
        return [
            Prediction(
                label=row["label"],
                probability=row["probability"],
                top_3=row["top_3"],
                error=row["error"],
            )
            for row in answer.json()["predictions"]
        ]
    except (requests.RequestException, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{address} does not answer as a classifier ({answer.status_code}): {first_line(error)}"
        ) from error
