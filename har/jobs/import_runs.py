"""The job `import-runs`: copies runs of other stores into this one, once each, and links twins."""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import mlflow

from har.compare.twins import link_twins
from har.tracking.foreign import ForeignStore, open_store, without_credentials
from har.tracking.local_store import store_lock
from har.tracking.query import find_runs
from har.tracking.records import Record
from har.tracking.store import (
    check_store,
    explain_store_errors,
    open_experiment,
    quiet_mlflow,
    short_timeouts,
)
from har.tracking.tags import NOTEBOOK, SOURCE_TAG
from har.tracking.transfer import Copied, Target, copy_runs, read_runs
from har.util.errors import UserError, first_line
from har.util.files import cache_folder
from har.util.locks import file_lock
from har.util.progress import say, warn
from har.util.signals import open_work

PAGE, MAX_RUNS = 1000, 100_000


@dataclass(frozen=True, kw_only=True)
class Imported:
    """What one source brought; `twins` has each new training with its twins."""

    source: str
    copied: Copied
    twins: list[tuple[Record, list[Record]]]


def import_runs(sources: Sequence[str], experiment: str | None) -> Iterator[Imported]:
    """Copy the finished runs of each source into the present store, and link their twins.

    A run that is here already, by whatever way it came, is left as it is; one that has grown since
    gets what is new. A source that cannot be read whole adds nothing.
    """
    quiet_mlflow()
    with file_lock(cache_folder() / "import.lock", waiting="waiting for another import"):
        for source in sources:
            yield _import(source, experiment)


def _import(source: str, experiment: str | None) -> Imported:
    with open_store(source) as store:
        # a new store is created whole, or not at all
        check_store()
        published = _find_published()
        with _explain_source(store.name), without_credentials(source):
            carried = read_runs(store, _find_runs(store, published))
        with explain_store_errors(), store_lock(), open_work():
            for name in dict.fromkeys(experiment or each.experiment for each in carried):
                open_experiment(name)
            try:
                copied = copy_runs(store, carried, Target(mlflow.MlflowClient()), experiment)
            except ValueError as error:
                raise UserError(f"{store.name} cannot be imported: {first_line(error)}") from error
    return Imported(source=store.name, copied=copied, twins=_link(copied))


def _link(copied: Copied) -> list[tuple[Record, list[Record]]]:
    """Link the twins of each training, also of one that an interrupted import left unlinked; return
    the new ones with theirs.
    """
    found = []
    for own, each in {**copied.kept, **copied.added}.items():
        if not _is_measured(each.run):
            continue
        try:
            linked = link_twins(own)
        # what others wrote may be no training to compare
        except UserError as error:
            warn(str(error))
            continue
        found += [linked] if own in copied.added else []
    return found


def _is_measured(run: Any) -> bool:
    tags = run.data.tags
    return tags.get("job") == "train" and tags.get(SOURCE_TAG) != NOTEBOOK


@contextmanager
def _explain_source(name: str) -> Iterator[None]:
    """Turn whatever a store of others makes MLflow raise into one line; MLflow logs it too."""
    logger = logging.getLogger("mlflow")
    before = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        with short_timeouts():
            yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{name} cannot be read: {first_line(error)}") from error
    finally:
        logger.setLevel(before)


def _find_runs(store: ForeignStore, published: set[str | None]) -> list[Any]:
    """Find the finished runs of this project in a store, and say what is left out."""
    found, unfinished, foreign, token = [], 0, 0, None
    ids = [each.experiment_id for each in store.client.search_experiments()]
    while ids:
        page = store.client.search_runs(ids, max_results=PAGE, page_token=token)
        for run in page:
            ours, finished = "job" in run.data.tags, run.info.status == "FINISHED"
            foreign += not ours
            unfinished += ours and not finished
            found += [run] if ours and finished else []
        if len(found) + unfinished + foreign > MAX_RUNS:
            raise ValueError(f"it has more than {MAX_RUNS:,} runs")
        if (token := page.token) is None:
            break
    if unfinished or foreign:
        say(
            f"left out of {store.name}: {unfinished} unfinished runs, {foreign} that this project"
            " did not record"
        )
    if not found:
        raise UserError(f"{store.name} has no finished runs of this project")
    return [
        run
        for run in found
        if run.data.tags.get(SOURCE_TAG) != NOTEBOOK
        or run.data.tags.get("variant") not in published
    ]


def _find_published() -> set[str | None]:
    """Find the variants whose published run is here: everyone has recorded the same."""
    runs = find_runs(f"tags.{SOURCE_TAG} = '{NOTEBOOK}' and attributes.status = 'FINISHED'")
    return {run.data.tags.get("variant") for run in runs}
