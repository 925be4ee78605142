"""Pictures of a search, as Optuna draws them."""

import warnings
from typing import TYPE_CHECKING, Any

import matplotlib

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from optuna import Study

IMPORTANCES, PARALLEL = "figures/importances.png", "figures/parallel_coordinates.png"
SIZE_INCHES = (10, 5)


def draw_importances(study: "Study") -> "Figure":
    """Draw the share of the scores' variance that each field explains (fANOVA, Hutter, Hoos and
    Leyton-Brown, 2014).
    """
    return _draw("plot_param_importances", study)


def draw_parallel_coordinates(study: "Study") -> "Figure":
    """Draw each complete trial as a line through its values."""
    return _draw("plot_parallel_coordinate", study)


def _draw(name: str, study: "Study") -> "Figure":
    # Optuna draws by pyplot, which else might open a window
    matplotlib.use("Agg")
    from optuna.exceptions import ExperimentalWarning
    from optuna.visualization import matplotlib as drawn

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        axes: Any = getattr(drawn, name)(study)
    figure: Figure = axes.figure
    figure.set_size_inches(*SIZE_INCHES)
    figure.tight_layout()
    return figure
