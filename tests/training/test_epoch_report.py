"""What a person reads while a training runs, and at its end."""

from pathlib import Path

import pytest

from har.data.manifest import Manifest
from har.training import epoch_report
from har.training.backup import Backup
from har.training.epoch_report import describe_end, describe_epoch, find_divergence
from har.training.train import train
from har.util.errors import UserError
from tests.fixtures import tiny_job, tiny_recipe


def test_epoch_lines_fit_80_columns() -> None:
    metrics = {
        "train_loss": 12.345,
        "train_accuracy": 1.0,
        "val_loss": 10.5,
        "val_accuracy": 0.5,
        "epoch_time_s": 1234.5,
        "images_per_second": 12345.0,
    }
    assert len(describe_epoch(100, 100, metrics)) <= 80


def test_the_end_says_why_and_which_weights_are_kept() -> None:
    history = [{"val_accuracy": value} for value in (0.3, 0.5, 0.4, 0.2)]
    stopped = tiny_recipe("v3", epochs=40, patience=2)
    assert describe_end(stopped, history, 2) == (
        "early stopping after epoch 4: no better val_accuracy in 2 epochs; the model keeps the"
        " weights of epoch 2 (val_accuracy 0.500)"
    )
    assert describe_end(tiny_recipe("original", epochs=4), history, None) == (
        "all epochs done; the model keeps the weights of the last epoch"
    )


def test_a_training_says_once_how_long_it_will_take(
    tiny_backbone: None,
    manifest: Manifest,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    job = tiny_job(tiny_recipe("v3", strategy="one_device", epochs=3), manifest)
    train(job)
    assert "min for" not in capsys.readouterr().err
    monkeypatch.setattr(epoch_report, "ESTIMATE_AFTER_S", 0.0)
    train(job)
    said = capsys.readouterr().err
    assert said.count("min for 3 epochs, sooner with early stopping") == 1


@pytest.mark.parametrize(
    ("losses", "problem"),
    [
        ({"train_loss": 2.7, "val_loss": 90.0}, ""),
        ({"train_loss": 54.0, "val_loss": 2.7}, ""),
        ({"train_loss": 180_480.0}, "train_loss is 1.805e+05, while guessing has 2.7"),
        ({"train_loss": float("nan"), "val_loss": 2.7}, "train_loss is nan"),
        ({"train_loss": 2.7, "val_loss": float("inf")}, "val_loss is inf"),
        ({"train_loss": float("inf")}, "train_loss is inf"),
    ],
)  # fmt: skip
def test_a_loss_without_bound_is_divergence(losses: dict[str, float], problem: str) -> None:
    found = find_divergence(losses, 15, tiny_recipe("v3", learning_rate=0.5))
    assert problem in found and bool(found) == bool(problem)
    assert not found or "lower --learning-rate (now 0.5), for example to 0.05" in found
    half = tiny_recipe("v4", precision="mixed_float16")
    assert not problem or "--precision float32" in find_divergence(losses, 15, half)


def test_a_training_that_diverges_stops_at_that_epoch(
    tiny_backbone: None, manifest: Manifest, tmp_path: Path
) -> None:
    job = tiny_job(
        tiny_recipe("original", strategy="one_device", learning_rate=10.0, epochs=40), manifest
    )
    epochs: list[int] = []
    backup = Backup(folder=tmp_path, started=0.0)
    with pytest.raises(UserError, match=r"the training diverged in epoch \d+: train_loss is"):
        train(job, on_epoch=lambda epoch, _: epochs.append(epoch), backup=backup)
    assert backup.useless and len(epochs) < 39
