"""What a person reads while a training runs, and at its end."""

import pytest

from har.data.manifest import Manifest
from har.training import epoch_report
from har.training.epoch_report import describe_end, describe_epoch
from har.training.train import train
from tests.conftest import tiny_job, tiny_recipe


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
    assert said.count("about 0 min for 3 epochs, sooner with early stopping") == 1
