"""Answers as a logged model with the code that it carries: run as a program, in its own process.

    python -P isolated.py MODEL_URI

A model carries the package `har` as it was when it was logged; a process that has imported another
version of it would mix the two. So nothing of `har` is imported here. Each line of standard input
is a JSON list of images in base64, each line of output the JSON list of their rows; the first line
of output says that the model is loaded, or why not.
"""

import base64
import json
import os
import sys
from typing import Any

import mlflow
import pandas as pd


def main() -> None:
    """Load the model named in the arguments, then answer line by line."""
    answers = os.fdopen(os.dup(1), "w")
    # what a model prints is no answer
    os.dup2(2, 1)

    def write(answer: Any) -> None:
        answers.write(json.dumps(answer) + "\n")
        answers.flush()

    try:
        model = mlflow.pyfunc.load_model(sys.argv[1])
    # others' code may raise anything
    except Exception as error:
        write({"error": f"{type(error).__name__}: {error}"})
        return
    write({"error": None})
    for line in sys.stdin:
        images = [base64.b64decode(each) for each in json.loads(line)]
        try:
            write(model.predict(pd.DataFrame({"image": images})))
        except Exception as error:
            write({"error": f"{type(error).__name__}: {error}"})


if __name__ == "__main__":
    main()
