"""Check every image: facts about its file, or the reason why it cannot be used.

Many images are checked in processes, since threads wait for Python's lock most of the time. Those
processes import this module, so it loads no pandas.
"""

import os
import signal
from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing, contextmanager, suppress
from functools import partial
from multiprocessing import resource_tracker
from pathlib import Path
from typing import TYPE_CHECKING, Any

from har.data.hashes import perceptual_hash
from har.data.images import ImageError, is_blank, is_plain_jpeg, open_image, read_image, to_rgb
from har.util.files import digest_bytes
from har.util.hardware import available_cpus
from har.util.progress import progress

if TYPE_CHECKING:
    import pandas as pd

# Fewer files are checked in threads: to start the processes takes a second.
MANY_FILES = 1000
# Files that a task checks: single files would take a tenth more time.
FILES_PER_TASK = 16
# Tasks that wait for each process, so that none is idle while an earlier task takes long.
TASKS_PER_PROCESS = 4
# A process that gets no task for so long ends, also where this one was killed.
IDLE_S = 60
COLUMNS = ["path", "width", "height", "bytes", "plain_jpeg", "blank", "sha256", "perceptual_hash"]
CRASHED = "reading it ends the process: damaged, or too large for the free memory"

# The facts of one image, or the reason why it cannot be used.
Found = dict[str, Any] | str


def inspect_images(root: Path, paths: "pd.Series[str]") -> "tuple[pd.DataFrame, dict[Any, str]]":
    """Return facts of each readable image, and reasons for the others, by the index of `paths`.

    The facts are the columns COLUMNS. `blank` is True for an image of one colour, as a transparent
    one becomes. The other columns are those of the manifest.
    """
    import pandas as pd

    good: dict[Any, dict[str, Any]] = {}
    bad: dict[Any, str] = {}
    inspect = _inspect_in_threads if len(paths) < MANY_FILES else _inspect_in_processes
    with (
        progress("checking images", len(paths)) as advance,
        # on Ctrl-C the processes end now, not whenever Python deletes the generator
        closing(inspect(root, paths.tolist())) as found,
    ):
        for (index, path), facts in zip(paths.items(), found, strict=True):
            if isinstance(facts, str):
                bad[index] = facts
            else:
                good[index] = {"path": path, **facts}
            advance(1)
    return pd.DataFrame.from_dict(good, orient="index", columns=COLUMNS), bad


def _inspect_in_threads(root: Path, paths: list[str]) -> Generator[Found, None, None]:
    # more threads than CPUs are slower: six threads on two CPUs take twice as long
    with ThreadPoolExecutor(available_cpus()) as pool:
        for found in pool.map(partial(_inspect_task, root), _split(paths)):
            yield from found


def _inspect_in_processes(root: Path, paths: list[str]) -> Generator[Found, None, None]:
    """Inspect in processes; an image that ends its process is found, and the others continue."""
    tasks = _split(paths)
    done = 0
    while done < len(tasks):
        try:
            for found in _run_tasks(root, tasks[done:]):
                done += 1
                yield from found
        except BrokenProcessPool:
            # the image is in one of the tasks that were waiting or running
            suspects = tasks[done : done + TASKS_PER_PROCESS * available_cpus()]
            done += len(suspects)
            yield from _inspect_apart(root, suspects)
        except OSError:
            # this system lacks what processes need, or allows no more of them
            yield from _inspect_in_threads(root, [path for task in tasks[done:] for path in task])
            return


def _split(paths: list[str]) -> list[list[str]]:
    return [paths[i : i + FILES_PER_TASK] for i in range(0, len(paths), FILES_PER_TASK)]


def _run_tasks(root: Path, tasks: list[list[str]]) -> Iterator[list[Found]]:
    """Yield what each task finds, in order; few tasks wait at a time."""
    processes = min(available_cpus(), len(tasks))
    waiting: deque[Future[list[Found]]] = deque()
    with _open_pool(processes) as pool:
        for task in tasks:
            waiting.append(pool.submit(_inspect_task, root, task))
            if len(waiting) == TASKS_PER_PROCESS * processes:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def _inspect_apart(root: Path, tasks: list[list[str]]) -> Iterator[Found]:
    """Inspect one task after another; a task that ends the process is halved until only the image
    that does it is left.
    """
    left = deque(tasks)
    while left:
        with _open_pool(1) as pool, suppress(BrokenProcessPool):
            while left:
                yield from pool.submit(_inspect_task, root, left[0]).result()
                left.popleft()
        if left:
            task = left.popleft()
            half = len(task) // 2
            if half:
                left.extendleft([task[half:], task[:half]])
            else:
                yield CRASHED


@contextmanager
def _open_pool(processes: int) -> Iterator[Executor]:
    """Start processes that leave Ctrl-C to this one; at the end of the block they are killed."""
    import loky

    pool = loky.ProcessPoolExecutor(
        processes,
        timeout=IDLE_S,
        initializer=_be_quiet,
        # the images are what runs in parallel
        env={"OPENBLAS_NUM_THREADS": "1"},
    )
    try:
        # a new process inherits that the signal is blocked, and so never sees it
        resource_tracker.ensure_running()  # it unblocks the signal when it starts
        unblocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            pool.submit(os.getpid)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, unblocked)
        yield pool
    finally:
        pool.shutdown(kill_workers=True)


def _be_quiet() -> None:
    """Hide what decoders print; errors come back as results."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)


def _inspect_task(root: Path, task: list[str]) -> list[Found]:
    return [_inspect_image(root, path) for path in task]


def _inspect_image(root: Path, path: str) -> Found:
    try:
        data = read_image(root / path, inside=root)
        image = open_image(data)
        facts = {"width": image.width, "height": image.height, "plain_jpeg": is_plain_jpeg(image)}
        pixels = to_rgb(image)
    except ImageError as error:
        return str(error)
    return {
        **facts,
        "bytes": len(data),
        "blank": is_blank(pixels),
        "sha256": digest_bytes(data),
        "perceptual_hash": perceptual_hash(pixels),
    }
