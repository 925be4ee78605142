"""Copies runs from one MLflow store into another, with all that belongs to them.

MLflow gives a copy a new id. The id in the store where the run was recorded stays in a tag, so that
a run is copied once, by whatever way it comes; so does that of a logged model.
"""

import json
import re
import shutil
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import mlflow
from mlflow.entities import LoggedModelOutput, LoggedModelStatus, Metric, Param, RunTag
from mlflow.utils.mlflow_tags import MLFLOW_PARENT_RUN_ID
from mlflow.utils.validation import _validate_batch_log_data, _validate_experiment_name

from har.tracking.foreign import ForeignStore, find_id, open_own_store
from har.tracking.tags import FROM_TAG, ORIGIN_TAG
from har.util.errors import UserError, first_line
from har.util.files import digest_bytes
from har.util.progress import progress

MODEL_ORIGIN_TAG = "original_model_id"
# A digest of the run as it was copied; a run without it was copied in part.
DIGEST_TAG = "imported_digest"
# Tags whose value is the id of another run.
RUN_LINKS = (MLFLOW_PARENT_RUN_ID, "trained_by", "candidate")
TWIN_LINK = "twin."
# Tags that each copy has for itself; the last one lists models by their old ids.
OWN_TAGS = (ORIGIN_TAG, FROM_TAG, DIGEST_TAG, "mlflow.log-model.history")
BATCH, MAX_POINTS = 900, 10_000_000
MODEL_FILE, MAX_DESCRIPTION_BYTES = "MLmodel", 5_000_000
# Files that run code when they are loaded. Ours are none of these.
PICKLES = re.compile(r".*\.(pkl|pickle|joblib|dill|cloudpickle|pt|pth)", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True)
class Carried:
    """A run as a store has it: its metrics with their whole history and links to models, and the
    models that it logged.
    """

    run: Any
    experiment: str
    metrics: list[Metric]
    models: list[Any]
    digest: str

    @property
    def origin(self) -> str:
        """The id of the run in the store where it was recorded."""
        return find_origin(self.run)


@dataclass(kw_only=True)
class Copied:
    """The runs that were copied, by their id here: new ones, and those that grew; `kept` were here
    already.
    """

    added: dict[str, Carried] = field(default_factory=dict)
    grown: dict[str, Carried] = field(default_factory=dict)
    kept: dict[str, Carried] = field(default_factory=dict)


def find_origin(run: Any) -> str:
    """Return the id of a run in the store where it was recorded."""
    return str(run.data.tags.get(ORIGIN_TAG, run.info.run_id))


def read_runs(store: ForeignStore, runs: Sequence[Any]) -> list[Carried]:
    """Read runs whole, except their files, and check that another store can take them.

    Raises:
        UserError: a run holds what MLflow does not allow, or a model holds a pickle.
    """
    names = {str(each.experiment_id): each.name for each in store.client.search_experiments()}
    models = _read_models(store, {run.info.experiment_id for run in runs})
    links = _link_metrics(models)
    found = []
    with progress("reading runs", len(runs)) as advance:
        for run in runs:
            try:
                found.append(_read_run(store, run, names, models, links))
            except UserError:
                raise
            # what others wrote may make MLflow raise anything
            except Exception as error:
                raise UserError(
                    f"run {run.info.run_id} of {store.name} cannot be read: {first_line(error)}"
                ) from error
            advance(1)
    return found


def _read_run(
    store: ForeignStore,
    run: Any,
    names: Mapping[str, str],
    models: Mapping[str, list[Any]],
    links: Mapping[tuple[Any, ...], Metric],
) -> Carried:
    run_id = run.info.run_id
    _check_numbers([run.info.start_time, run.info.end_time])
    metrics: list[Metric] = []
    for name in run.data.metrics:
        history = store.client.get_metric_history(run_id, name)
        if len(metrics) + len(history) > MAX_POINTS:
            raise ValueError(f"it has more than {MAX_POINTS:,} metric values")
        _check_numbers([number for m in history for number in (m.timestamp, m.step)])
        metrics += [links.get((run_id, m.key, m.timestamp, m.step), m) for m in history]
    own = models.get(run_id, [])
    tags, params = _as_entities(run)
    _validate_batch_log_data(metrics, params, tags)
    experiment = names[str(run.info.experiment_id)]
    _validate_experiment_name(experiment)
    listing = {find_id(each): sorted(store.list_files(each).items()) for each in (run, *own)}
    _refuse_pickles(run_id, dict(listing[run_id]))
    for each in own:
        _check_model(each.model_id, dict(listing[each.model_id]))
    return Carried(
        run=run,
        experiment=experiment,
        metrics=metrics,
        models=own,
        digest=_digest(run, metrics, list(listing.values())),
    )


def _digest(run: Any, metrics: Sequence[Metric], listings: Sequence[Any]) -> str:
    """Return a digest of a run that is the same for its copies, whose ids differ."""
    tags = [
        (name, value.replace(run.info.run_id, "this run"))
        for name, value in run.data.tags.items()
        if _is_own(name)
    ]
    facts = [
        sorted(run.data.params.items()),
        sorted(tags),
        sorted((m.key, m.timestamp, m.step, repr(m.value)) for m in metrics),
        [run.info.status, run.info.start_time, run.info.end_time],
        listings,
    ]
    return digest_bytes(json.dumps(facts).encode())[:16]


def _check_numbers(values: Iterable[Any]) -> None:
    """Raise a ValueError unless each value is None or a whole number; SQLite stores text too."""
    for value in values:
        if value is not None and (not isinstance(value, int) or abs(value) >= 2**63):
            raise ValueError(f"a time or a step is {value!r:.60}")


def _as_entities(run: Any) -> tuple[list[RunTag], list[Param]]:
    tags = [RunTag(name, value) for name, value in run.data.tags.items()]
    return tags, [Param(name, value) for name, value in run.data.params.items()]


def _is_own(name: str) -> bool:
    """Return whether a tag is the run's own: no link to another run, and nothing that each copy has
    for itself.
    """
    return name not in (*RUN_LINKS, *OWN_TAGS) and not name.startswith(TWIN_LINK)


def _refuse_pickles(owner: str, sizes: Mapping[str, int]) -> None:
    if pickles := [name for name in sizes if PICKLES.fullmatch(name)]:
        raise UserError(
            f"{owner} holds {pickles[0]}, a pickle, which can run any code where it is loaded: none"
            " of these runs is copied"
        )


def _check_model(model_id: str, sizes: Mapping[str, int]) -> None:
    _refuse_pickles(model_id, sizes)
    if sizes.get(MODEL_FILE, MAX_DESCRIPTION_BYTES + 1) > MAX_DESCRIPTION_BYTES:
        raise UserError(f"model {model_id} has no file {MODEL_FILE}, or one that is far too large")


def _read_models(store: ForeignStore, experiment_ids: set[str]) -> dict[str, list[Any]]:
    """Map runs to their finished models, oldest first."""
    found: dict[str, list[Any]] = {}
    ids, token = sorted(experiment_ids), None
    while ids:
        page = store.client.search_logged_models(ids, page_token=token)
        for each in page:
            if each.status == LoggedModelStatus.READY:
                found.setdefault(each.source_run_id, []).append(each)
        if (token := page.token) is None:
            break
    for models in found.values():
        models.sort(key=lambda each: (each.creation_timestamp, each.model_id))
    return found


def _link_metrics(models: Mapping[str, Sequence[Any]]) -> dict[tuple[Any, ...], Metric]:
    """Map (run, name, time, step) to the metric with its model and data set: a run's own history
    does not say them.
    """
    every = (metric for each in models.values() for model in each for metric in model.metrics or ())
    return {(m.run_id, m.key, m.timestamp, m.step): m for m in every}


class Target:
    """The store to copy into; `artifact_root` is where new experiments keep their files, None for
    where the store likes.
    """

    def __init__(self, client: mlflow.MlflowClient, artifact_root: Path | None = None) -> None:
        """Note which runs the store has."""
        self.client, self.artifact_root = client, artifact_root
        self.experiments = {
            each.name: str(each.experiment_id) for each in client.search_experiments()
        }
        self.run_ids: dict[str, str] = {}
        self.experiment_of: dict[str, str] = {}
        self.digests: dict[str, str | None] = {}
        self.model_ids: dict[str, str] = {}
        for run in _search_all(client, list(self.experiments.values())):
            origin, own = find_origin(run), run.info.run_id
            self.run_ids[origin] = own
            self.experiment_of[own] = str(run.info.experiment_id)
            # a run that was recorded here is whole
            self.digests[own] = run.data.tags.get(DIGEST_TAG) if origin != own else "own"

    def find_experiment(self, name: str) -> str:
        """Return the id of an experiment, which is created if need be."""
        if name not in self.experiments:
            where = self.artifact_root
            location = (where / str(len(self.experiments))).as_uri() if where else None
            self.experiments[name] = self.client.create_experiment(name, location)
        return self.experiments[name]


def _search_all(client: mlflow.MlflowClient, experiment_ids: list[str]) -> Iterable[Any]:
    token = None
    while experiment_ids:
        page = client.search_runs(experiment_ids, page_token=token)
        yield from page
        if (token := page.token) is None:
            return


def copy_runs(
    store: ForeignStore, carried: Sequence[Carried], target: Target, experiment: str | None = None
) -> Copied:
    """Copy what is new, into the experiments of the same names or into `experiment`.

    Given again after it was interrupted, it goes on where it was.
    """
    copied = Copied()
    try:
        for each in sorted(carried, key=lambda one: (one.run.info.start_time or 0, one.origin)):
            name = experiment or each.experiment
            own = target.run_ids.get(each.origin) or _create_run(each, target, name, store.name)
            # links in this store name its own ids
            target.run_ids[each.run.info.run_id] = own
            _note_models(target, own)
            digest = target.digests.get(own)
            same = digest in ("own", each.digest)
            (copied.kept if same else copied.grown if digest else copied.added)[own] = each
        _copy_all(store, copied, target)
    except Exception:
        # nothing half-imported stays; a run that was interrupted does, to be gone on with
        _delete_unfinished(copied, target)
        raise
    return copied


def _copy_all(store: ForeignStore, copied: Copied, target: Target) -> None:
    new = {**copied.added, **copied.grown}
    with progress("copying runs", len(new)) as advance:
        for own, each in {**copied.kept, **new}.items():
            for model in each.models:
                origin = model.tags.get(MODEL_ORIGIN_TAG, model.model_id)
                if origin not in target.model_ids and own in new:
                    _copy_model(store, model, own, target)
                if origin in target.model_ids:
                    target.model_ids[model.model_id] = target.model_ids[origin]
        # links point at runs and models that are all there now
        for own, each in new.items():
            _fill_run(store, each, own, target, grown=own in copied.grown)
            advance(1)
        for own, each in copied.kept.items():
            if target.digests[own] != "own":
                _link_run(each, own, target)


def _delete_unfinished(copied: Copied, target: Target) -> None:
    for own in copied.added:
        # whatever goes wrong now, the first error is what the user must see
        with suppress(Exception):
            if DIGEST_TAG not in target.client.get_run(own).data.tags:
                target.client.delete_run(own)


def _create_run(each: Carried, target: Target, experiment: str, source: str) -> str:
    tags = {ORIGIN_TAG: each.origin, FROM_TAG: source}
    experiment_id = target.find_experiment(experiment)
    created = target.client.create_run(
        experiment_id,
        start_time=each.run.info.start_time,
        tags=tags,
        run_name=each.run.info.run_name,
    )
    target.run_ids[each.origin] = str(created.info.run_id)
    target.experiment_of[created.info.run_id] = experiment_id
    return str(created.info.run_id)


def _note_models(target: Target, run_id: str) -> None:
    """Note which models a run here has; one that was copied in part is deleted."""
    ids, of_run = [target.experiment_of[run_id]], f"source_run_id = '{run_id}'"
    for model in target.client.search_logged_models(ids, filter_string=of_run):
        if model.status == LoggedModelStatus.READY:
            target.model_ids[model.tags.get(MODEL_ORIGIN_TAG, model.model_id)] = model.model_id
        elif target.digests.get(run_id) != "own":
            target.client.delete_logged_model(model.model_id)


def _copy_model(store: ForeignStore, model: Any, run_id: str, target: Target) -> None:
    origin = model.tags.get(MODEL_ORIGIN_TAG, model.model_id)
    created = target.client.create_logged_model(
        target.experiment_of[run_id],
        name=model.name,
        source_run_id=run_id,
        tags={**_without_mlflow(model.tags), MODEL_ORIGIN_TAG: origin},
        params=model.params,
        model_type=model.model_type,
    )
    with store.open_files(model) as folder, TemporaryDirectory() as scratch:
        copy = Path(scratch) / "model"
        if folder is not None:
            shutil.copytree(folder, copy)
            _rename_ids(copy / MODEL_FILE, {"run_id": run_id, "model": created.model_id})
            _check_names(copy, run_id)
            target.client.log_model_artifacts(created.model_id, str(copy))
    target.client.finalize_logged_model(created.model_id, "READY")
    target.model_ids[origin] = created.model_id


def _without_mlflow(tags: Mapping[str, str]) -> dict[str, str]:
    """Return the tags that a client may set on a model."""
    kept = ("mlflow.user", "mlflow.source.name", "mlflow.source.type")
    return {n: value for n, value in tags.items() if not n.startswith("mlflow.") or n in kept}


def _rename_ids(file: Path, ids: Mapping[str, str]) -> None:
    """Name the new run and model in an MLmodel file; its other lines stay as they are."""
    text = file.read_bytes().decode("utf-8", "surrogateescape")
    text = re.sub(r"(?m)^run_id: [^\r\n]*", f"run_id: {ids['run_id']}", text)
    text = re.sub(r"(?m)^(model_id|model_uuid): [^\r\n]*", rf"\1: {ids['model']}", text)
    file.write_bytes(text.encode("utf-8", "surrogateescape"))


def _check_names(folder: Path, run_id: str) -> None:
    """Raise a ValueError if the model names another run: YAML has several ways to write a name, and
    the copy must not pass for that run's model.
    """
    try:
        found = mlflow.models.Model.load(str(folder)).run_id
    # YAML's errors, and whatever MLflow raises for values that it does not expect
    except Exception as error:
        raise ValueError(f"{MODEL_FILE} is damaged: {first_line(error)}") from error
    if found != run_id:
        raise ValueError(f"{MODEL_FILE} names another run than the model's")


def _fill_run(store: ForeignStore, each: Carried, own: str, target: Target, grown: bool) -> None:
    """Copy all of a run into its copy `own`, and mark that as whole; a copy that is there already
    only gains what it lacks.
    """
    client, run = target.client, each.run
    there = client.get_run(own)
    known = set(there.data.tags) if grown else set()
    tags, params = _as_entities(run)
    tags = [
        # the run's description links to the run itself
        RunTag(tag.key, tag.value.replace(run.info.run_id, own))
        for tag in tags
        if tag.key not in known and _is_own(tag.key)
    ]
    for start in range(0, len(params), 100):
        client.log_batch(own, params=params[start : start + 100])
    for start in range(0, len(tags), 100):
        client.log_batch(own, tags=tags[start : start + 100])
    metrics = [_relink(metric, target) for metric in each.metrics]
    for start in range(0, len(metrics), BATCH):
        client.log_batch(own, metrics=metrics[start : start + BATCH])
    if run.inputs and run.inputs.dataset_inputs:
        client.log_inputs(own, datasets=run.inputs.dataset_inputs)
    _link_run(each, own, target)
    listed = set(open_own_store().list_files(there)) if grown else set()
    with store.open_files(run) as folder:
        for path in sorted(folder.rglob("*")) if folder else ():
            name = path.relative_to(folder) if folder else path
            if path.is_file() and str(name) not in listed:
                parent = "" if str(name.parent) == "." else str(name.parent)
                client.log_artifact(own, str(path), parent or None)
    ends = [end for end in (run.info.end_time, there.info.end_time if grown else None) if end]
    client.set_terminated(own, run.info.status, max(ends, default=None))
    client.set_tag(own, DIGEST_TAG, each.digest)


def _link_run(each: Carried, own: str, target: Target) -> None:
    """Write the links to other runs and to models that the copy lacks and that resolve here."""
    there = target.client.get_run(own)
    for name in RUN_LINKS:
        linked = each.run.data.tags.get(name)
        if linked in target.run_ids and name not in there.data.tags:
            target.client.set_tag(own, name, target.run_ids[linked])
    known = {each.model_id for each in there.outputs.model_outputs} if there.outputs else set()
    outputs = [
        LoggedModelOutput(target.model_ids[each.model_id], each.step)
        for each in (each.run.outputs.model_outputs if each.run.outputs else ())
        if each.model_id in target.model_ids
    ]
    if new := [output for output in outputs if output.model_id not in known]:
        target.client.log_outputs(own, new)


def _relink(metric: Metric, target: Target) -> Metric:
    return Metric(
        metric.key,
        metric.value,
        metric.timestamp,
        metric.step,
        model_id=target.model_ids.get(metric.model_id) if metric.model_id else None,
        dataset_name=metric.dataset_name,
        dataset_digest=metric.dataset_digest,
    )
