"""The state of a training after an epoch: captured from Keras, and restored to resume from it."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import keras
import numpy.typing as npt

from har.recipe import Recipe
from har.training.arrays import Arrays
from har.util.errors import UserError
from har.util.json_text import check_number

# The kinds of arrays that a state has: a model's, its optimizer's, and the best epoch's.
GROUPS = ("learner", "optimizer", "best")
# What Keras' early stopping remembers, beside the best weights.
STOPPING_FIELDS = ("wait", "best", "best_epoch")


@dataclass(frozen=True, kw_only=True)
class State:
    """The state after `len(history)` epochs, which took `train_time_s` seconds.

    `stopping` is what early stopping remembers, empty without it. `arrays` holds the values of the
    variables that training changes, of the optimizer, and of the best epoch's weights.
    """

    history: list[dict[str, float]]
    train_time_s: float
    stopping: dict[str, float]
    arrays: Arrays

    def first_epoch(self, recipe: Recipe) -> int:
        """The next epoch, counted from 0; `recipe.epochs` if early stopping ended the training, or
        its head was solved for.
        """
        if recipe.solved:
            return recipe.epochs
        stopped = recipe.patience and self.stopping["wait"] >= recipe.patience
        return recipe.epochs if stopped else len(self.history)


def check_state(state: State) -> None:
    """Raise a ValueError or a TypeError unless a state that was read could have been captured."""
    check_number(state.train_time_s, "train_time_s", 0, math.inf)
    if not state.history or not isinstance(state.history, list):
        raise ValueError("its history is no list of epochs")
    names = frozenset(state.history[0])
    for epoch in state.history:
        # a loss may be NaN or infinite
        if frozenset(epoch) != names or not {type(each) for each in epoch.values()} <= {int, float}:
            raise ValueError("its history is no list of epochs with the same numbers")
    if state.stopping and set(state.stopping) != set(STOPPING_FIELDS):
        raise ValueError(f"it lacks one of {', '.join(STOPPING_FIELDS)}")
    for name, value in state.stopping.items():
        check_number(value, name, -math.inf, math.inf)
    counts = Counter(name.partition("/")[0] for name in state.arrays)
    known = {f"{group}/{number}" for group in GROUPS for number in range(counts[group])}
    if set(state.arrays) != known:
        raise ValueError("its arrays are not those of a model and its optimizer")


class Stopping(keras.callbacks.EarlyStopping):
    """Keras' early stopping after `patience` epochs (0: never), which can be resumed. It keeps the
    best epoch's weights if the recipe says so.
    """

    def __init__(self, recipe: Recipe, resume_from: State | None = None) -> None:
        """Resume from `resume_from`, if that is given."""
        super().__init__(
            monitor="val_accuracy",
            mode="max",
            patience=recipe.patience or recipe.epochs,
            restore_best_weights=recipe.checkpoint == "best",
        )
        self.resume_from = resume_from

    def on_train_begin(self, logs: Any = None) -> None:
        """Restore the memory after Keras has reset it."""
        super().on_train_begin(logs)
        if self.resume_from is None:
            return
        for name in STOPPING_FIELDS:
            setattr(self, name, self.resume_from.stopping[name])
        if best := _group_values("best", self.resume_from.arrays):
            self.best_weights = self.model.get_weights()
            places = _find_changing_places(self.model)
            shapes = [self.best_weights[place].shape for place in places]
            if shapes != [value.shape for value in best]:
                raise UserError("the backup's best weights are of another model")
            for place, value in zip(places, best, strict=True):
                self.best_weights[place] = value


def capture_state(
    learner: keras.Model,
    stopping: Stopping | None,
    history: Sequence[dict[str, float]],
    train_time_s: float,
) -> State:
    """Capture the state of a model in `fit`, between two epochs."""
    groups: dict[str, list[Any]] = {
        "learner": find_changing_variables(learner),
        "optimizer": learner.optimizer.variables,
        "best": [],
    }
    if stopping is not None and stopping.best_weights is not None:
        groups["best"] = [stopping.best_weights[place] for place in _find_changing_places(learner)]
    return State(
        history=list(history),
        train_time_s=train_time_s,
        stopping={name: float(getattr(stopping, name)) for name in STOPPING_FIELDS}
        if stopping
        else {},
        arrays={
            f"{group}/{number}": keras.ops.convert_to_numpy(value)
            for group, values in groups.items()
            for number, value in enumerate(values)
        },
    )


def restore_state(learner: keras.Model, state: State) -> None:
    """Set the weights, random states and optimizer of a freshly built model to those of `state`."""
    with learner.distribute_strategy.scope():
        learner.optimizer.build(learner.trainable_variables)
        for group, variables in (
            ("learner", find_changing_variables(learner)),
            ("optimizer", learner.optimizer.variables),
        ):
            values = _group_values(group, state.arrays)
            shapes = [tuple(variable.shape) for variable in variables]
            if shapes != [value.shape for value in values]:
                raise UserError(f"the backup's {group} is of another model")
            for variable, value in zip(variables, values, strict=True):
                variable.assign(value)


def _group_values(group: str, arrays: Arrays) -> list[npt.NDArray[Any]]:
    count = sum(name.startswith(f"{group}/") for name in arrays)
    return [arrays[f"{group}/{number}"] for number in range(count)]


def _find_frozen_weights(learner: keras.Model) -> set[int]:
    """Find the ids of the weights that training leaves as they are: most of a model."""
    frozen: set[int] = set()
    for layer in learner.layers:
        if isinstance(layer, keras.Model):
            frozen |= _find_frozen_weights(layer)
        elif not layer.trainable:
            frozen |= {id(weight) for weight in layer.weights}
    return frozen


def find_changing_variables(learner: keras.Model) -> list[Any]:
    """Find the variables that training changes: weights, and dropout's random states."""
    frozen = _find_frozen_weights(learner)
    return [each for each in learner.variables if id(each) not in frozen]


def _find_changing_places(learner: keras.Model) -> list[int]:
    """Find where in `get_weights` the weights are that training changes."""
    frozen = _find_frozen_weights(learner)
    return [place for place, each in enumerate(learner.weights) if id(each) not in frozen]
