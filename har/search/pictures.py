"""Pictures of a search, as Optuna draws them."""

import warnings
from typing import TYPE_CHECKING, Any

import matplotlib

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from optuna import Study

IMPORTANCES, PARALLEL = "figures/importances.png", "figures/parallel_coordinates.png"
SIZE_INCHES = (10, 5)


def draw_importances(study: "Study", metric: str) -> "Figure":
    """Draw how much each field decides whether a trial is among the best (PED-ANOVA, Watanabe,
    Bansal and Hutter, 2023).
    """
    return _draw("plot_param_importances", study, metric)


def draw_parallel_coordinates(study: "Study", metric: str) -> "Figure":
    """Draw each complete trial as a line through its values."""
    return _draw("plot_parallel_coordinate", study, metric)


def _draw(name: str, study: "Study", metric: str) -> "Figure":
    # Optuna draws by pyplot, which else might open a window
    matplotlib.use("Agg")
    from optuna.visualization import matplotlib as drawn

    with warnings.catch_warnings():
        # that the drawing may change, and that few trials say little
        warnings.simplefilter("ignore")
        axes: Any = getattr(drawn, name)(study, target_name=metric)
    figure: Figure = axes.figure
    figure.set_size_inches(*SIZE_INCHES)
    figure.tight_layout()
    return figure
