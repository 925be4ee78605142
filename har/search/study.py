"""A search by Optuna: trials in Optuna's own storage, which several processes may share.

A trial that was interrupted counts for nothing: the next one tries the same values. One process
alone tries the same values in the same order each time, interrupted or not.
"""

import importlib.util
import logging
import random
import time
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

from har.search.space import Choice, Space
from har.util.errors import UserError, first_line, without_password
from har.util.files import cache_folder
from har.util.locks import file_lock

if TYPE_CHECKING:
    from optuna import Study, Trial
    from optuna.trial import FrozenTrial

# A metric of the validation images, as it is logged for each epoch.
Metric = Literal["val_accuracy", "val_top_3_accuracy", "val_loss"]
METRICS = get_args(Metric)
# Where a search is kept unless the user says otherwise: beside the local tracking store.
LOCAL_STORAGE = "sqlite:///optuna.db"
# A process that shows no sign of life for GRACE_S is taken for dead, and its trial for interrupted.
HEARTBEAT_S, GRACE_S = 5, 30
# Trials before any is pruned, and before the sampler learns from them.
STARTUP_TRIALS = 5
SQLITE_WAIT_S = 60
# Names of a trial's attributes: why it failed, the process that ran it, what it trains, and that
# another trial trains the same.
ERROR, PROCESS, DIGEST, REPEATED = "error", "process", "digest", "repeated"
# So many repeated trials, one after the other, end a search: hardly anything new is left to try.
MAX_REPEATED = 30
# After a repeated trial, choices are drawn at random for so many trials.
REMEMBERED = 8
# The states of a trial that is over, as Optuna names them, the best first.
OVER = ("COMPLETE", "PRUNED", "FAIL")


def check_optuna() -> None:
    """Raise a UserError unless Optuna is installed, before any slow work."""
    if importlib.util.find_spec("optuna") is None:
        raise UserError("a search needs the package optuna: pip install 'optuna>=5,<6'")


class TrialFailed(Exception):
    """A trial could not be trained, for the reason that its attribute `error` names."""


@dataclass(frozen=True, kw_only=True)
class Progress:
    """How far a search has come: `done` trials are over, of which some are complete, some failed,
    some were pruned; others are at work. `best` is the best complete one.
    """

    done: int
    complete: int
    failed: int
    pruned: int
    running: int
    best: "FrozenTrial | None"


class Search:
    """A search in `storage`, opened by name; created if it is not there.

    Raises:
        UserError: the storage cannot be used.
    """

    def __init__(
        self,
        storage: str,
        name: str,
        space: Space,
        metric: Metric,
        *,
        seed: int,
        spared: int,
        process: str,
    ) -> None:
        """`seed` decides what is tried, together with the trials before. No trial is pruned in its
        first `spared` epochs. `process` tells those who share the search apart.
        """
        import optuna

        optuna.logging.set_verbosity(optuna.logging.ERROR)
        self.space, self.metric, self.seed = space, metric, seed
        self.storage, self.name, self.process = storage, name, process
        direction = "minimize" if metric.endswith("loss") else "maximize"
        # two processes that create the tables at once would be in each other's way
        unusable = explain_storage_errors(storage, ImportError, RuntimeError)
        with unusable, file_lock(cache_folder() / "optuna.lock"):
            self.study: Study = optuna.create_study(
                storage=_open_storage(storage),
                study_name=name,
                direction=direction,
                pruner=optuna.pruners.MedianPruner(STARTUP_TRIALS, n_warmup_steps=spared),
                load_if_exists=True,
            )

    @property
    def progress(self) -> Progress:
        """How far the search has come, whichever process did it."""
        ended = self.ended
        states = [each.state.name for each in ended]
        return Progress(
            done=len(ended),
            complete=states.count("COMPLETE"),
            failed=states.count("FAIL"),
            pruned=states.count("PRUNED"),
            running=len(self._list_trials(("RUNNING",))),
            best=ended[0] if ended and states[0] == "COMPLETE" else None,
        )

    @property
    def ended(self) -> "list[FrozenTrial]":
        """The trials that are over, the best first, then the pruned and the failed ones."""
        sign = 1 if self.metric.endswith("loss") else -1
        rank = {state: number for number, state in enumerate(OVER)}
        over = [each for each in self._list_trials(OVER) if REPEATED not in each.user_attrs]
        return sorted(
            over, key=lambda each: (rank[each.state.name], sign * (each.value or 0), each.number)
        )

    @property
    def is_exhausted(self) -> bool:
        """Whether the newest trials all repeated earlier ones."""
        newest = self._list_trials(OVER)[-MAX_REPEATED:]
        repeated = sum(REPEATED in each.user_attrs for each in newest)
        return repeated == MAX_REPEATED

    def _list_trials(self, states: Collection[str]) -> "list[FrozenTrial]":
        """List the trials in these states by number, without those that were interrupted."""
        with explain_storage_errors(self.storage):
            trials = self.study.get_trials(deepcopy=False)
        return [each for each in trials if each.state.name in states and not is_interrupted(each)]

    def claim(self, trial: "Trial", digest: str) -> bool:
        """Note what a trial is about to train; return False if another trial of this search trains
        or trained the same.
        """
        trial.set_user_attr(DIGEST, digest)
        others = self._list_trials((*OVER, "RUNNING"))
        same = [each for each in others if each.user_attrs.get(DIGEST) == digest]
        if all(each.number >= trial.number for each in same):
            return True
        trial.set_user_attr(REPEATED, True)
        return False

    def load_trial(self, trial_id: int) -> "Trial":
        """Load a trial that another process started."""
        import optuna

        return optuna.trial.Trial(self.study, trial_id)

    def run_trial(
        self, evaluate: "Callable[[Trial, dict[str, Any]], float]", start: Mapping[str, Any]
    ) -> "FrozenTrial":
        """Choose values, `evaluate` them, and record the result; the first trial has the values
        `start`, if there are any. Returns the trial, which `evaluate` may have ended by
        TrialFailed or `TrialPruned`, and other processes as interrupted (`is_interrupted`).
        """
        number = len(self._list_trials((*OVER, "RUNNING")))
        with explain_storage_errors(self.storage):
            if start and not number:
                self.study.enqueue_trial(dict(start))
            self.study.sampler = self._build_sampler(number)
        tried: list[Trial] = []

        def objective(trial: "Trial") -> float:
            tried.append(trial)
            trial.set_user_attr(PROCESS, self.process)
            try:
                return evaluate(trial, suggest(trial, self.space))
            finally:
                lost.append(self._load(trial).state.is_finished())

        lost: list[bool] = []
        try:
            with explain_storage_errors(self.storage):
                self.study.optimize(objective, n_trials=1, catch=TrialFailed)
        # whatever Optuna makes of a trial that others have ended
        except Exception:
            if not any(lost):
                raise
        return self._load(tried[0])

    def _load(self, trial: "Trial") -> "FrozenTrial":
        with explain_storage_errors(self.storage):
            return self.study._storage.get_trial(trial._trial_id)

    def _build_sampler(self, number: int) -> Any:
        """Build the sampler for a trial; its seed follows from the `number` of trials before, so
        that a resumed search tries what an uninterrupted one would.
        """
        from optuna.exceptions import ExperimentalWarning
        from optuna.samplers import PartialFixedSampler, TPESampler

        seed = self.seed + number
        sampler = TPESampler(seed=seed, n_startup_trials=STARTUP_TRIALS)
        newest = self._list_trials(OVER)[-REMEMBERED:]
        discrete = {name: each for name, each in self.space.items() if each.is_discrete}
        if not discrete or not any(REPEATED in each.user_attrs for each in newest):
            return sampler
        # the sampler would stay with the best choice, even if there is nothing more to try in it
        drawn = {name: values.draw(random.Random(seed)) for name, values in discrete.items()}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ExperimentalWarning)
            return PartialFixedSampler(drawn, sampler)

    def wait_for_others(self) -> Progress:
        """Wait until every other process has ended its trial, or has shown no life for GRACE_S."""
        import optuna

        while (progress := self.progress).running:
            with warnings.catch_warnings(), explain_storage_errors(self.storage):
                warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
                optuna.storages.fail_stale_trials(self.study)
            time.sleep(1)
        return progress

    def is_last(self) -> bool:
        """Return whether this process ended the newest trial, or ran none: of several processes,
        that one evaluates the winner.
        """
        ended = [each for each in self.study.get_trials(deepcopy=False) if each.datetime_complete]
        processes = {each.user_attrs.get(PROCESS) for each in ended}
        newest = max(ended, key=lambda each: (each.datetime_complete, each.number))
        return self.process not in processes or newest.user_attrs.get(PROCESS) == self.process


def is_interrupted(trial: "FrozenTrial") -> bool:
    """Return whether a trial was cut short: its values are tried again."""
    return trial.state.name == "FAIL" and not {ERROR, REPEATED} & set(trial.user_attrs)


def suggest(trial: "Trial", space: Space) -> dict[str, Any]:
    """Let Optuna choose a value for each field."""
    found: dict[str, Any] = {}
    for name, values in space.items():
        if isinstance(values, Choice):
            found[name] = trial.suggest_categorical(name, values.values)
        elif isinstance(values.low, int):
            found[name] = trial.suggest_int(name, values.low, int(values.high), log=values.log)
        else:
            found[name] = trial.suggest_float(name, values.low, values.high, log=values.log)
    return found


def _open_storage(url: str) -> Any:
    import optuna

    wait = {"connect_args": {"timeout": SQLITE_WAIT_S}} if url.startswith("sqlite:") else {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        return optuna.storages.RDBStorage(
            url, engine_kwargs=wait, heartbeat_interval=HEARTBEAT_S, grace_period=GRACE_S
        )


@contextmanager
def explain_storage_errors(storage: str, *more: type[Exception]) -> Iterator[None]:
    """Turn errors of Optuna's storage, and `more`, into a UserError that names it, without its
    password.
    """
    from optuna.exceptions import StorageInternalError
    from sqlalchemy.exc import SQLAlchemyError

    logging.getLogger("alembic").setLevel(logging.WARNING)
    try:
        yield
    except (SQLAlchemyError, StorageInternalError, *more) as error:
        raise UserError(
            f"--storage {without_password(storage)} cannot be used: {first_line(error)}; give the"
            f" URL of a database, such as {LOCAL_STORAGE} or postgresql://HOST/NAME"
            " (pip install 'psycopg[binary]')"
        ) from error
