"""A search by Optuna: trials in Optuna's own storage, which several processes may share.

A trial that was interrupted counts for nothing: the next one tries the same values. One process
alone tries the same values in the same order each time, interrupted or not.
"""

import importlib.util
import logging
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args
from uuid import uuid4

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
# Names of a trial's attributes: why it failed, and the process that ran it.
ERROR, PROCESS = "error", "process"


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

    def __init__(self, storage: str, name: str, space: Space, metric: Metric, seed: int) -> None:
        """`seed` decides what is tried, together with the trials before."""
        import optuna

        optuna.logging.set_verbosity(optuna.logging.ERROR)
        self.space, self.metric, self.seed = space, metric, seed
        self.storage, self.name = storage, name
        self.process = uuid4().hex
        direction = "minimize" if metric.endswith("loss") else "maximize"
        # two processes that create the tables at once would be in each other's way
        with explain_storage_errors(storage), file_lock(cache_folder() / "optuna.lock"):
            self.study: Study = optuna.create_study(
                storage=_open_storage(storage),
                study_name=name,
                direction=direction,
                pruner=optuna.pruners.MedianPruner(n_startup_trials=STARTUP_TRIALS),
                load_if_exists=True,
            )

    @property
    def progress(self) -> Progress:
        """How far the search has come, whichever process did it."""
        from optuna.trial import TrialState

        ended = self.ended
        complete, pruned, failed = (
            [each for each in ended if each.state is state]
            for state in (TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL)
        )
        running = self.study.get_trials(deepcopy=False, states=[TrialState.RUNNING])
        return Progress(
            done=len(ended),
            complete=len(complete),
            failed=len(failed),
            pruned=len(pruned),
            running=len(running),
            best=complete[0] if complete else None,
        )

    @property
    def ended(self) -> "list[FrozenTrial]":
        """The trials that are over, the best first, then the pruned and the failed ones."""
        from optuna.trial import TrialState

        with explain_storage_errors(self.storage):
            trials = self.study.get_trials(deepcopy=False)
        sign = 1 if self.metric.endswith("loss") else -1
        rank = {TrialState.COMPLETE: 0, TrialState.PRUNED: 1, TrialState.FAIL: 2}
        over = [
            each
            for each in trials
            if each.state in rank
            and (each.state is not TrialState.FAIL or ERROR in each.user_attrs)
        ]
        return sorted(
            over, key=lambda each: (rank[each.state], sign * (each.value or 0), each.number)
        )

    def load_trial(self, trial_id: int) -> "Trial":
        """Load a trial that another process started."""
        import optuna

        return optuna.trial.Trial(self.study, trial_id)

    def run_trial(
        self, evaluate: "Callable[[Trial, dict[str, Any]], float]", start: Mapping[str, Any]
    ) -> "FrozenTrial":
        """Choose values, `evaluate` them, and record the result; the first trial has the values
        `start`, if there are any. Returns the trial, which `evaluate` may have ended by
        TrialFailed or `TrialPruned`.
        """
        import optuna

        progress = self.progress
        number = progress.done + progress.running
        with explain_storage_errors(self.storage):
            if start and not number:
                self.study.enqueue_trial(dict(start))
            # the seed follows from the trials before, as an interrupted search is resumed
            self.study.sampler = optuna.samplers.TPESampler(
                seed=self.seed + number, n_startup_trials=STARTUP_TRIALS
            )
        ended: list[FrozenTrial] = []

        def objective(trial: "Trial") -> float:
            trial.set_user_attr(PROCESS, self.process)
            return evaluate(trial, suggest(trial, self.space))

        self.study.optimize(
            objective,
            n_trials=1,
            catch=TrialFailed,
            callbacks=[lambda study, trial: ended.append(trial)],
        )
        return ended[0]

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
        """Return whether this process ended the newest trial, or ran none of them: of several
        processes, that one evaluates the winner.
        """
        ended = [each for each in self.study.get_trials(deepcopy=False) if each.datetime_complete]
        processes = {each.user_attrs.get(PROCESS) for each in ended}
        newest = max(ended, key=lambda each: (each.datetime_complete, each.number))
        return self.process not in processes or newest.user_attrs.get(PROCESS) == self.process


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
def explain_storage_errors(storage: str) -> Iterator[None]:
    """Turn errors of Optuna's storage into a UserError that names it, without its password."""
    from optuna.exceptions import StorageInternalError
    from sqlalchemy.exc import SQLAlchemyError

    logging.getLogger("alembic").setLevel(logging.WARNING)
    try:
        yield
    except (SQLAlchemyError, StorageInternalError, ModuleNotFoundError, RuntimeError) as error:
        raise UserError(
            f"--storage {without_password(storage)} cannot be used: {first_line(error)}; give the"
            f" URL of a database, such as {LOCAL_STORAGE} or postgresql://HOST/NAME"
        ) from error
