"""Tasks of the inspection that end their process, or take long. Processes import this module, and
so it imports little.
"""

import os
import time
from pathlib import Path

from har.data import inspection
from har.data.inspection import Found

INSPECT_TASK = inspection._inspect_task
CRASHING = {"007.jpg", "150.jpg", "151.jpg"}


def end_process(root: Path, task: list[str]) -> list[Found]:
    """End the process, as a decoder that crashes does, at some files."""
    if CRASHING & set(task):
        os._exit(11)
    return INSPECT_TASK(root, task)


def sleep_long(root: Path, task: list[str]) -> list[Found]:
    """Leave a file as a sign that the process runs, and do nothing for long."""
    (root / f"started {os.getpid()}").touch()
    time.sleep(100)
    return []
