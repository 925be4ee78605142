"""Twins: trainings of one recipe on the same images on other hardware, linked to each other.

`find_twins`, `compare` and the lines are pure; what is below them reads runs and marks them. Every
run of a family is compared anew and written only where something changed, until nothing changes: so
it does not matter which of two runs that end at once comes first, and deleted twins are forgotten.
"""

import random
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import mlflow
import numpy as np
import numpy.typing as npt
import pandas as pd
from mlflow.exceptions import MlflowException
from mlflow.utils.mlflow_tags import MLFLOW_RUN_NOTE

from har.evaluation.metrics import in_points, paired_difference
from har.tracking.query import find_runs, find_training, load_predictions
from har.tracking.records import DIGESTS, TrainingSummary, find_hits_by_path, read_training
from har.tracking.store import quiet_mlflow
from har.tracking.tags import NOTEBOOK, SOURCE_TAG
from har.util.errors import UserError, first_line
from har.util.progress import warn

# Before the twin's hardware; before `notebook` for the published run of the variant.
TAG = "twin."
HEADING = "\n\n**Elsewhere**, in relation to this run:"
# Times that a family is gone over, where other runs of it end meanwhile.
ATTEMPTS = 5


@dataclass(frozen=True, kw_only=True)
class Link:
    """A training in relation to its twin, as ratios twin / training; None where not known.

    `difference` is the twin's test accuracy minus the training's, low and high its 95 % interval.
    """

    twin: TrainingSummary
    time_ratio: float | None
    speed_ratio: float | None
    difference: tuple[float, float, float] | None

    @property
    def key(self) -> str:
        """Names the tag that holds the twin's run id; MLflow allows no `+` there."""
        return TAG + (NOTEBOOK if self.twin.published else self.twin.hardware.replace("+", "."))


def find_twins(
    training: TrainingSummary, others: Iterable[TrainingSummary]
) -> list[TrainingSummary]:
    """The newest twin on each other hardware, and the published run of the same variant."""
    found: dict[str, TrainingSummary] = {}
    for each in sorted(others, key=lambda other: (other.started, other.run_id)):
        if each.published:
            if each.variant == training.variant:
                found[NOTEBOOK] = each
        elif each.digests == training.digests and each.hardware != training.hardware:
            found[each.hardware] = each
    return [found[hardware] for hardware in sorted(found)]


def compare_twins(
    training: TrainingSummary,
    twin: TrainingSummary,
    hits: Mapping[str, npt.NDArray[np.bool_] | None],
) -> Link:
    """`hits` by run id: which test images each is right on, in one order; where they are known."""
    difference = None
    here, there = hits.get(training.run_id), hits.get(twin.run_id)
    if here is not None and there is not None and len(here) == len(there):
        difference = paired_difference(here, there)
    # with features from the cache the wall time is not the whole job's
    whole = not (training.cache_hit or twin.cache_hit)
    return Link(
        twin=twin,
        time_ratio=_ratio(twin.seconds, training.seconds) if whole else None,
        speed_ratio=_ratio(twin.images_per_second, training.images_per_second),
        difference=difference,
    )


def _ratio(above: float | None, below: float | None) -> float | None:
    """None where one of them is not known."""
    return above / below if above and below else None


def describe_link(link: Link) -> str:
    """For a run's description in the MLflow UI."""
    twin = link.twin
    facts = [f"{twin.seconds:,.0f} s" if twin.seconds else "wall time not known"]
    if link.time_ratio:
        facts[0] += f", {link.time_ratio:.2f} times this run's wall time"
    if link.speed_ratio:
        facts.append(f"{link.speed_ratio:.2f} times its images/s")
    if link.difference:
        facts.append(f"accuracy {in_points(link.difference)} points")
    if twin.cache_hit:
        facts.append("cache hit: its features were found on disk")
    if twin.published:
        facts.append("published, on other images and with the network of the notebook")
    address = f"#/experiments/{twin.experiment_id}/runs/{twin.run_id}"
    return f"[{twin.name}]({address}): " + "; ".join(facts)


def with_links(description: str, links: Sequence[Link]) -> str:
    """The description with one line for each link, in place of those it had."""
    own = description.partition(HEADING)[0]
    if not links:
        return own
    return own + "  \n".join([HEADING, *map(describe_link, links)])


def describe_twins(training: TrainingSummary, links: Sequence[Link]) -> str:
    """The table that `har twins` prints; the first row is the training itself."""
    rows = [_table_row(training, None), *(_table_row(link.twin, link) for link in links)]
    table = pd.DataFrame(rows).to_string(index=False)
    if not links:
        table += (
            "\nno twins: no finished training of the same recipe, data and test split on other"
            " hardware, and no published run of the variant (`har import-notebooks`)"
        )
    return table


def _table_row(training: TrainingSummary, link: Link | None) -> dict[str, str]:
    """Of the table; `link` is None for the training that the others are compared with."""

    def shown(value: float | None, form: str) -> str:
        return "-" if value is None else format(value, form)

    hardware = f"{training.hardware}{' (published)' if training.published else ''}"
    return {
        "hardware": f"{hardware}{' (cache hit)' if training.cache_hit else ''}",
        "wall time s": shown(training.seconds, ",.0f"),
        "ratio": "1" if link is None else shown(link.time_ratio, ".2f"),
        "images/s": shown(training.images_per_second, ",.0f"),
        "accuracy": shown(training.accuracy, ".1%"),
        "difference, points": in_points(link.difference) if link and link.difference else "-",
        "run id": training.run_id,
    }


def link_twins(run_id: str) -> tuple[TrainingSummary, list[Link]]:
    """Mark the run and all its twins with tags and lines; the run's own links.

    Raises:
        UserError: no such run, or not a finished training; the store cannot be used.
    """
    quiet_mlflow()
    hits: dict[str, npt.NDArray[np.bool_] | None] = {}
    for attempt in range(ATTEMPTS):
        try:
            training, links, changed = _link_once(run_id, hits)
        # a run that someone changed by hand may lack anything
        except (MlflowException, OSError, KeyError, ValueError) as error:
            # two that write the same new tag at once: MLflow gives one of them an error
            if attempt == ATTEMPTS - 1 or not isinstance(error, MlflowException):
                why = first_line(error)
                raise UserError(f"twins of run {run_id} cannot be linked: {why}") from error
            time.sleep(random.uniform(0.1, 0.5))
            continue
        if not changed:
            break
    return training, links


def _link_once(
    run_id: str, hits: dict[str, npt.NDArray[np.bool_] | None]
) -> tuple[TrainingSummary, list[Link], bool]:
    """The run, its links, and whether anything had to be written; `hits` is filled."""
    training, family = _load_family(run_id)
    for run in family:
        if run.info.run_id not in hits:
            hits[run.info.run_id] = _load_hits(run)
    trainings = [read_training(each) for each in family]

    def find_links(own: TrainingSummary) -> list[Link]:
        return [compare_twins(own, twin, hits) for twin in find_twins(own, trainings)]

    # every one is written, whatever the first of them says
    changed = [
        _write_links(run, find_links(own))
        for run, own in zip(family, trainings, strict=True)
        if not own.published
    ]
    return training, find_links(training), any(changed)


def _load_family(run_id: str) -> tuple[TrainingSummary, list[Any]]:
    """The training, and all runs that are twins of one another with it, itself among them."""
    run = find_training(run_id)
    tags = run.data.tags
    if not all(name in tags for name in DIGESTS):
        raise UserError(f"run {run_id} was published: ask for the twins of a measured run")
    same = " and ".join(f"tags.{name} = '{tags[name]}'" for name in DIGESTS)
    family = find_runs(f"{same} and tags.job = 'train' and attributes.status = 'FINISHED'")
    variants = {each.data.tags["variant"] for each in family}
    published = find_runs(f"tags.{SOURCE_TAG} = '{NOTEBOOK}' and attributes.status = 'FINISHED'")
    family += [each for each in published if each.data.tags["variant"] in variants]
    return read_training(run), family


def _load_hits(run: Any) -> npt.NDArray[np.bool_] | None:
    """Which test images a run is right on, in the order of their paths; None if not known."""
    if "accuracy" not in run.data.metrics:
        return None
    try:
        return find_hits_by_path(load_predictions(run.info.run_id)).to_numpy()
    except UserError as error:
        warn(str(error))
        return None


def _write_links(run: Any, links: Sequence[Link]) -> bool:
    """Tags and description; whether anything had to be written."""
    client, tags = mlflow.MlflowClient(), run.data.tags
    wanted = {link.key: link.twin.run_id for link in links}
    old = tags.get(MLFLOW_RUN_NOTE, "")
    if (text := with_links(old, links)) != old:
        wanted[MLFLOW_RUN_NOTE] = text
    news = {name: value for name, value in wanted.items() if tags.get(name) != value}
    gone = [name for name in tags if name.startswith(TAG) and name not in wanted]
    for name, value in news.items():
        client.set_tag(run.info.run_id, name, value)
    for name in gone:
        client.delete_tag(run.info.run_id, name)
    return bool(news or gone)
