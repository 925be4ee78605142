"""Figures: what they show, and that nothing in the data can break them."""

from pathlib import Path

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from har.data.pictures import one_line
from har.evaluation.evaluate import Evaluation
from har.evaluation.figures import (
    draw_class_intervals,
    draw_confusion,
    draw_curves,
    draw_mistakes,
    draw_reliability,
)

HOSTILE = ("$\\frac{1}$", "_hidden", "two\nlines \\$ \x00", "very long " * 30, "")


def pixels(figure: Figure, path: Path) -> int:
    figure.savefig(path)
    return path.stat().st_size


def some_evaluation(class_names: tuple[str, ...], images: int = 60) -> Evaluation:
    rng = np.random.default_rng(0)
    return Evaluation(
        class_names=class_names,
        paths=[f"{i}.jpg" for i in range(images)],
        label_ids=rng.integers(0, len(class_names), images),
        probabilities=rng.dirichlet(np.ones(len(class_names)), images).astype(np.float32),
    )


def classes(count: int) -> tuple[str, ...]:
    return tuple(f"class_{i}" for i in range(count))


@pytest.mark.parametrize("count", [2, 15])
def test_confusion_counts_every_image(count: int, tmp_path: Path) -> None:
    figure = draw_confusion(some_evaluation(classes(count)))
    (axes, _) = figure.axes
    assert sum(int(text.get_text()) for text in axes.texts) == 60
    assert "of 60 test images" in figure.get_suptitle()
    assert pixels(figure, tmp_path / "confusion.png") > 5000


def test_curves_show_validation_only_where_there_is_one(tmp_path: Path) -> None:
    epoch = {"train_loss": 1.0, "train_accuracy": 0.5}
    assert len(draw_curves([epoch]).axes[0].lines) == 1
    both = {**epoch, "val_loss": 1.0, "val_accuracy": 0.4}
    figure = draw_curves([both, both])
    assert [len(axes.lines) for axes in figure.axes] == [2, 2]
    assert pixels(figure, tmp_path / "curves.png") > 5000


@pytest.mark.parametrize("draw", [draw_confusion, draw_reliability, draw_class_intervals])
def test_labels_are_drawn_as_they_stand(draw, tmp_path: Path) -> None:
    assert pixels(draw(some_evaluation(HOSTILE)), tmp_path / "figure.png") > 5000


def test_one_line() -> None:
    assert one_line("using_laptop") == "using_laptop"
    assert one_line("a \n\t b\x00\ud800") == "a b"
    assert one_line("abcdef", 6) == "abcdef"
    assert one_line("abcdefg", 6) == "abcde…"


def points(axes: Axes) -> np.ndarray:
    """The positions that have interval bars, (points, 2)."""
    (container,) = axes.containers
    return np.column_stack([np.asarray(data, float) for data in container[0].get_data()])


def test_reliability_shows_the_bins_that_have_images(tmp_path: Path) -> None:
    evaluation = some_evaluation(classes(4))
    figure = draw_reliability(evaluation)
    above, below = figure.axes
    table = evaluation.reliability.query("images > 0")
    assert 0 < len(table) < 15
    np.testing.assert_allclose(points(above), table[["confidence", "accuracy"]])
    assert sum(bar.get_height() for bar in below.patches) == 60
    assert f"{evaluation.scores['calibration_error']:.1%}" in above.get_title()
    assert pixels(figure, tmp_path / "reliability.png") > 5000


def test_class_intervals_are_sorted_and_leave_out_unseen_classes() -> None:
    evaluation = Evaluation(
        class_names=("half", "unseen", "none", "all"),
        paths=["x"] * 4,
        label_ids=np.array([0, 0, 2, 3]),
        probabilities=np.eye(4, dtype=np.float32)[[0, 3, 0, 3]],
    )
    (axes,) = draw_class_intervals(evaluation).axes
    names = [label.get_text() for label in axes.get_yticklabels()]
    assert names == ["none (1)", "half (2)", "all (1)"]
    assert points(axes).tolist() == [[0, 0], [0.5, 1], [1, 2]]


def write_pictures(folder: Path, evaluation: Evaluation) -> None:
    for i, path in enumerate(evaluation.paths):
        Image.new("RGB", (40 + i, 20), (3 * i, 0, 0)).save(folder / path)


def test_gallery_shows_the_surest_mistakes_unstretched(tmp_path: Path) -> None:
    evaluation = some_evaluation(("a", "b", "c"))
    write_pictures(tmp_path, evaluation)
    figure = draw_mistakes(evaluation, tmp_path, count=7)
    mistakes = evaluation.mistakes
    shown = [axes for axes in figure.axes if axes.images]
    assert len(shown) == 7
    for axes, mistake in zip(shown, mistakes.itertuples(), strict=False):
        percent = f"{100 * mistake.probability:.0f} %"
        assert axes.get_title() == f"{mistake.label}\n-> {mistake.predicted} {percent}"
        height, width, _ = axes.images[0].get_array().shape
        assert (height, width) == (20, 40 + int(Path(mistake.path).stem))
        assert axes.get_aspect() == 1
    title = f"{len(mistakes)} of 60 test images wrong: the 7 most confident"
    assert figure.get_suptitle() == title
    assert pixels(figure, tmp_path / "mistakes.png") > 5000


def test_gallery_survives_lost_files_and_hostile_labels(tmp_path: Path) -> None:
    evaluation = some_evaluation(HOSTILE, images=30)
    write_pictures(tmp_path, evaluation)
    gone, broken = evaluation.mistakes["path"][:2]
    (tmp_path / gone).unlink()
    (tmp_path / broken).write_bytes(b"no picture")
    figure = draw_mistakes(evaluation, tmp_path)
    notes = [[text.get_text() for text in axes.texts] for axes in figure.axes]
    assert notes[:3] == [["cannot be read"], ["cannot be read"], []]
    assert pixels(figure, tmp_path / "mistakes.png") > 5000


def test_gallery_says_that_there_are_no_mistakes(tmp_path: Path) -> None:
    evaluation = Evaluation(
        class_names=("a", "b"),
        paths=["x", "y"],
        label_ids=np.array([0, 1]),
        probabilities=np.eye(2, dtype=np.float32),
    )
    figure = draw_mistakes(evaluation, tmp_path)
    assert [text.get_text() for text in figure.texts] == ["no mistakes: all 2 test images correct"]
    assert pixels(figure, tmp_path / "none.png") > 1000


@pytest.mark.parametrize("count", [31, 400, 5000])
@pytest.mark.parametrize("draw", [draw_confusion, draw_class_intervals])
def test_many_classes_make_no_larger_picture(draw, count: int, tmp_path: Path) -> None:
    whole = draw(some_evaluation(classes(30), images=300))
    figure = draw(some_evaluation(classes(count), images=300))
    assert max(figure.get_size_inches() / whole.get_size_inches()) <= 1
    figure.savefig(tmp_path / "figure.png")
    shown = [axes.get_xlabel() for axes in figure.axes] + [figure.get_suptitle()]
    known = (
        count
        if draw is draw_confusion
        else len(set(some_evaluation(classes(count), 300).label_ids))
    )
    assert (f"30 of {known:,} classes" in " ".join(shown)) is (known > 30)
