"""The command line as a user meets it: help, results, mistakes."""

import errno
import os
import signal
import subprocess
import sys
import time
from dataclasses import fields
from functools import partial
from pathlib import Path

import mlflow
import pytest
from mlflow import MlflowClient

from har.cli.main import main
from har.recipe import VARIANTS, Recipe
from har.util.signals import STOPPING_SIGNALS
from tests.fixtures import tracking_to

TINY_RUN = (
    "--image-size", 32, "--batch-size", 4, "--epochs", 1, "--test-fraction", 0.25,
    "--strategy", "one_device", "--experiment", "har-tests",
)  # fmt: skip


@pytest.mark.parametrize(
    "command",
    [
        (),
        ("variants",),
        ("sample",),
        ("prepare",),
        ("audit-labels",),
        ("train",),
        ("evaluate",),
        ("run",),
    ],
)
def test_help_everywhere(cli, command: tuple[str, ...]) -> None:
    result = cli(*command, "--help")
    assert result.exit_code == 0 and "Usage:" in result.output


def test_every_recipe_field_is_an_option(cli) -> None:
    for command in ("run", "train"):
        text = cli(command, "--help").output
        for field in fields(Recipe):
            assert f"--{field.name.replace('_', '-')} " in text


def test_run_and_train_are_one_command() -> None:
    run, train = main.commands["run"], main.commands["train"]
    assert run.params == train.params and run.callback == train.callback


def test_help_shows_the_defaults_of_the_variants(cli) -> None:
    text = " ".join(cli("train", "--help").output.split())
    assert "[32]" in text and "[original, v1, v7: 0; v2, v3, v4, v5, v6: 5]" in text


READING = [
    ("champion",),
    ("twins", "ab"),
    ("compare",),
    ("compare", "ab", "cd"),
    ("evaluate", "ab"),
    ("promote", "--dry-run"),
    ("promote", "ab"),
    ("classify", "."),
    ("classify", ".", "--model", "runs:/ab/model"),
    ("predict", "--data", "."),
    ("train", "--reproduce", "ab"),
    ("train", "--resume", "ab"),
]


@pytest.mark.parametrize("command", READING, ids=" ".join)
def test_reading_creates_nothing_and_names_the_store(
    command: tuple[str, ...], cli, tmp_path: Path, tiny_raw: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tiny_raw / "train")
    with tracking_to(f"sqlite:///{tmp_path}/mlflow.db"):
        result = cli(*command)
    assert result.exit_code == 2 and not (tmp_path / "mlflow.db").exists()
    assert result.stderr == (
        f"error: no runs are recorded here: there is no {tmp_path}/mlflow.db; cd to the folder that"
        " holds your mlflow.db, or set MLFLOW_TRACKING_URI\n"
    )


def test_without_the_packages_a_line_says_how_to_get_them() -> None:
    # -S: no site-packages
    done = subprocess.run(
        [sys.executable, "-S", "-m", "har", "run"],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2 and done.stdout == ""
    assert "has no package click: run `make setup`" in done.stderr
    assert ". .venv/bin/activate" in done.stderr and len(done.stderr.splitlines()) == 1


def test_variants_prints_the_chain(cli) -> None:
    assert all(name in cli("variants").output for name in VARIANTS)


def test_sample_and_prepare(cli, tmp_path: Path) -> None:
    drawn = cli("sample", "--out", tmp_path / "s", "--per-class", 4, "--test-images", 1)
    assert drawn.exit_code == 0 and len(list((tmp_path / "s" / "train").iterdir())) == 60
    sample, out = tmp_path / "s", tmp_path / "p"
    made = cli("prepare", "--data", sample, "--out", out, "--test-fraction", 0.25)
    assert made.exit_code == 0, made.output
    assert "60 images of 15 classes, 15 held out for test" in made.output
    assert {"manifest.csv", "dataset.json", "report.html"} == {path.name for path in out.iterdir()}


def test_run_ends_with_the_table(cli, tiny_backbone: None, raw: Path, store: str) -> None:
    result = cli("run", "--data", raw, *TINY_RUN)
    assert result.exit_code == 0, result.output
    header, row, changed, command, page = result.stdout.splitlines()
    assert header.split("  ")[0] == "variant" and row.startswith("v3")
    assert "accuracy (95 % interval)" in header and "% to " in row
    assert "backbone=efficientnet-lite0" in changed and "epochs=1" in changed
    assert command.startswith("see it: ")
    assert command.endswith(f" -m mlflow server --backend-store-uri {store} --workers 1")
    run = mlflow.get_run(row.split()[-1])
    there = f"experiments/{run.info.experiment_id}/runs?viewStateShareKey=results"
    assert page.strip() == f"then open http://127.0.0.1:5000/#/{there}"
    assert run.info.status == "FINISHED"
    # from the start of this process, which is older than the run
    assert run.data.metrics["wall_time_s"] > run.data.metrics["train_time_s"]

    # held out as the run did, without being told
    evaluated = cli("evaluate", run.info.run_id[:12], "--data", raw, "--experiment", "har-tests")
    assert evaluated.exit_code == 0, evaluated.output
    assert f"accuracy           {run.data.metrics['accuracy']:.4f}" in evaluated.stdout


@pytest.mark.slow
def test_a_run_is_repeated_with_equal_numbers(
    cli, tiny_backbone: None, raw: Path, store: str
) -> None:
    def train(*arguments: object) -> mlflow.entities.Run:
        result = cli("train", "--data", raw, "--experiment", "har-tests", *arguments)
        assert result.exit_code == 0, result.output
        return mlflow.get_run(result.stdout.splitlines()[1].split()[-1])

    def numbers(run: mlflow.entities.Run) -> dict[str, float]:
        timings = ("_s", "_ms", "_second", "_mb")
        return {
            name: value
            for name, value in run.data.metrics.items()
            if not name.startswith("system/") and not name.endswith(timings)
        }

    first = train("--variant", "v2", *TINY_RUN[:-2], "--split-seed", 3, "--seed", 7)
    again = train("--reproduce", first.info.run_id[:12])
    assert again.info.run_id != first.info.run_id
    assert numbers(again) == numbers(first) and "val_loss" in numbers(first)
    for name in (
        "variant",
        "recipe_digest",
        "dataset_digest",
        "test_digest",
        "differs_from_variant",
    ):
        assert again.data.tags[name] == first.data.tags[name]

    features = train("--variant", "v5", "--runtime", "tensorflow", *TINY_RUN)
    repeated = train("--reproduce", features.info.run_id)
    assert repeated.data.params["used.feature_runtime"] == "tensorflow"
    assert numbers(repeated) == numbers(features)

    # another runtime is no other recipe: only what was evaluated by it differs, in the last digits
    faster = train("--reproduce", first.info.run_id, "--runtime", "openvino")
    assert faster.data.params["runtime"] == "openvino"
    assert numbers(faster) == pytest.approx(numbers(first), abs=1e-5)
    # and what repeats that one computes as it did
    as_fast = train("--reproduce", faster.info.run_id)
    assert as_fast.data.params["runtime"] == "openvino"
    assert numbers(as_fast) == numbers(faster)
    assert faster.data.tags["recipe_digest"] == first.data.tags["recipe_digest"]

    (raw / "train" / "Image_1.jpg").write_bytes((raw / "train" / "Image_2.jpg").read_bytes())
    result = cli("train", "--data", raw, "--reproduce", first.info.run_id)
    assert result.exit_code == 2 and "its dataset_digest is" in result.stderr


@pytest.mark.slow
def test_a_second_run_on_the_same_images_finds_their_features(
    cli, tiny_backbone: None, raw: Path, store: str
) -> None:
    def run(*arguments: object) -> tuple[mlflow.entities.Run, str]:
        # --runtime auto: openvino, which is installed here
        result = cli("run", "--variant", "v5", "--data", raw, *TINY_RUN, *arguments)
        assert result.exit_code == 0, result.output
        run = mlflow.get_run(result.stdout.splitlines()[1].split()[-1])
        # who reads the table must not take it for the time of the whole job
        assert ("(cache hit)" in result.stdout) == (run.data.tags["feature_cache"] == "hit")
        return run, result.stderr

    cold, said = run()
    assert "compiling efficientnet-lite0 for openvino" in said
    assert cold.data.tags["feature_cache"] == "miss"
    assert cold.data.params["used.feature_runtime"] == "openvino"
    assert cold.data.params["used.feature_arithmetic"] in ("float32", "bfloat16")
    numbers = cold.data.metrics
    assert 0 < numbers["extraction_time_s"] < numbers["train_time_s"] < numbers["wall_time_s"]
    warm, said = run("--head", "flatten_dense512")
    assert warm.data.tags["feature_cache"] == "hit" and "compiling" not in said
    # the logged model is an ordinary one, and says of the raw images what was logged
    evaluated = cli("evaluate", "--run-id", cold.info.run_id, "--data", raw)
    assert evaluated.exit_code == 0, evaluated.output
    assert f"accuracy           {numbers['accuracy']:.4f}" in evaluated.stdout

    listed = cli("cache")
    assert listed.exit_code == 0 and "2 entries" in listed.stdout
    assert "efficientnet-lite0 32 px, openvino 2" in listed.stdout
    assert listed.stdout.count("float32, complete") >= 1
    cleared = cli("cache", "--clear")
    assert cleared.stdout.startswith("freed ") and "0 entries" in cleared.stdout
    assert run()[0].data.tags["feature_cache"] == "miss"


def test_what_gives_way_is_said(cli, tiny_backbone: None, raw: Path, store: str) -> None:
    result = cli("train", "--variant", "v4", "--data", raw, *TINY_RUN)
    assert result.exit_code == 0, result.output
    assert (
        "warning: no GPU: using backbone efficientnet-lite0 and precision float32"
        " (to insist: --backbone efficientnetb7 --precision mixed_float16)"
    ) in result.stderr


def test_underscores_are_dashes(cli) -> None:
    result = cli("run", "--batch_size", "0")
    assert "'--batch-size'" in result.stderr and "0 is not in the range" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("run", "--variant", "v9"), "'v9' is not one of 'original', 'v1', 'v2', 'v3', 'v4', 'v5'"),
        (("run", "--epochs", "many"), "'many' is not a valid integer"),
        (("run", "--epochs", "0"), "0 is not in the range"),
        (("run", "--learning-rate", "nan"), "nan is no number between 1e-09 and 10.0"),
        (("run", "--precision", "fp16"), "'fp16' is not one of 'float32', 'mixed_float16'"),
        (("run", "--epoch", "3"), "No such option '--epoch'"),
        (("rum",), "No such command 'rum'"),
        (("run", "--data", "/no/such"), "no such folder: /no/such (--data /no/such)"),
        (("run", "--validation-fraction", "0"), "needs validation images, but"),
        (
            ("train", "--reproduce", "x", "--epochs", "3", "--seed", "1"),
            "leave out --epochs, --seed",
        ),
        (("train", "--reproduce", "nosuchrun"), "'nosuchrun' is no run id"),
        (("train", "--reproduce", "0" * 32), f"run {'0' * 32} cannot be repeated"),
        (
            ("run", "--resume", "x", "--data", "y", "--variant", "v3"),
            "--resume takes these from the run: leave out --data, --variant",
        ),
        (("run", "--fine-tune", "all", "--variant", "v5"), "fine_tune=all changes it"),
        (("run", "--variant", "v5", "--feature-views", "3"), "feature_views=3 are augmented views"),
        (("run", "--runtime", "tpu"), "'tpu' is not one of 'auto', 'tensorflow', 'openvino'"),
        (("evaluate",), "either RUN_ID or --model URI"),
        (("evaluate", "--run-id", "a", "--model", "b"), "either RUN_ID or --model URI"),
        (("evaluate", "a", "--run-id", "b"), "received a and --run-id b"),
        (("promote", "0" * 32), f"run {'0' * 32} cannot be read"),
        (("sample", "--out", "x", "--per-class", "1"), "1 is not in the range x>=2"),
    ],
)
def test_mistakes_are_one_line_and_exit_2(cli, store: str, arguments: tuple, message: str) -> None:
    result = cli(*arguments)
    assert result.exit_code == 2
    assert message in result.stderr and result.stderr.startswith("error: ")
    assert len(result.stderr.splitlines()) == 1


def test_weights_that_cannot_be_had_leave_a_failed_run(cli, raw: Path, store: str) -> None:
    weights = (*TINY_RUN, "--backbone", "efficientnetb0", "--weights")
    result = cli("run", "--data", raw, *weights, "nowhere.h5")
    assert result.exit_code == 2
    assert "error: no such weights file: nowhere.h5" in result.stderr
    foreign = raw / "foreign.h5"
    foreign.write_text("not weights")
    result = cli("run", "--data", raw, *weights, foreign)
    assert result.exit_code == 2
    assert "foreign.h5 does not hold weights of" in result.stderr
    latest = mlflow.search_runs(
        experiment_names=["har-tests"], max_results=1, output_format="list"
    )[0]
    assert latest.info.status == "FAILED"
    assert latest.data.params["recipe.weights"] == str(foreign)


@pytest.mark.parametrize("how", STOPPING_SIGNALS)
def test_a_signal_ends_the_run_as_killed(
    how: signal.Signals, cli, tiny_backbone: None, tiny_raw: Path, store: str, after_each_epoch
) -> None:
    after_each_epoch(lambda epoch: signal.raise_signal(how))
    experiment = f"stopped by {how.name}"
    result = cli("run", "--data", tiny_raw, *TINY_RUN[:-1], experiment, "--epochs", 9)
    assert result.exit_code == 130, result.output
    assert result.stderr.splitlines()[-1] == "stopped"
    (run,) = mlflow.search_runs(experiment_names=[experiment], output_format="list")
    assert run.info.status == "KILLED"
    assert len(MlflowClient().get_metric_history(run.info.run_id, "val_accuracy")) == 1


def test_help_is_fast_and_loads_nothing_heavy() -> None:
    check = (
        "import sys, har.cli.main; heavy = {'tensorflow', 'keras', 'mlflow', 'pandas', 'sklearn',"
        " 'matplotlib', 'numpy'} & set(sys.modules); sys.exit(repr(heavy) if heavy else 0)"
    )
    assert subprocess.run([sys.executable, "-c", check], check=False).returncode == 0
    times = []
    for _ in range(3):
        started = time.monotonic()
        subprocess.run([sys.executable, "-m", "har", "--help"], check=True, capture_output=True)
        times.append(time.monotonic() - started)
    assert min(times) < 0.5


def test_what_the_system_refuses_is_said_in_a_line(cli, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wherever it is met; other errors of the system are bugs and keep their trace."""

    def refuse(number: int) -> None:
        raise OSError(number, os.strerror(number), "there")

    for number in (errno.ENOSPC, errno.EACCES):
        monkeypatch.setattr(main.commands["variants"], "callback", partial(refuse, number))
        result = cli("variants")
        assert result.exit_code == 2
        assert result.output.strip() == f"error: [Errno {number}] {os.strerror(number)}: 'there'"

    def fill_the_disk() -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(main.commands["variants"], "callback", fill_the_disk)
    said = cli("variants").output
    assert said.startswith(f"error: No space left on device; har writes into {Path.cwd()}, ")
    assert f"{os.environ['HAR_CACHE']} (HAR_CACHE)" in said
    monkeypatch.setattr(main.commands["variants"], "callback", partial(refuse, errno.ENOTDIR))
    assert isinstance(cli("variants").exception, NotADirectoryError)
