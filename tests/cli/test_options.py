"""Every option of every command with values that it cannot take: one line, and no run."""

from collections.abc import Iterator

import click
import mlflow
import pytest

from har.cli.main import main

# What a command cannot do without, so that the option under test is what is wrong.
REQUIRED = {
    "sample": ["--out", "sample"],
    "predict": ["--data", "images"],
    "classify": ["image.jpg"],
    "twins": ["0" * 32],
}


def wrong_values(kind: click.ParamType) -> list[str]:
    """Values that an option of this kind refuses."""
    if isinstance(kind, click.IntRange | click.FloatRange):
        wrong = ["many", "", "nan", "inf"]
        if kind.min is not None:
            wrong.append(str(kind.min - 1))
        if kind.max is not None:
            wrong.append(str(kind.max + 1))
        if isinstance(kind, click.IntRange):
            wrong.append("1.5")
        return wrong
    if isinstance(kind, click.Choice):
        return ["nonsense", "", kind.choices[0].upper() + "x"]
    if isinstance(kind, type(click.BOOL)):
        return ["perhaps"]
    return []


def cases() -> Iterator[tuple[str, str, str]]:
    for command_name, command in main.commands.items():
        for option in command.params:
            if isinstance(option, click.Option) and not option.is_flag:
                for value in wrong_values(option.type):
                    yield command_name, option.opts[0], value


@pytest.mark.parametrize("command", sorted(main.commands))
def test_wrong_values_are_named(command: str, store: str, cli) -> None:
    runs = len(mlflow.search_runs(search_all_experiments=True, output_format="list"))
    for _, option, value in (each for each in cases() if each[0] == command):
        result = cli(command, *REQUIRED.get(command, []), f"{option}={value}")
        said = result.output.strip()
        assert result.exit_code == 2, (option, value, said)
        assert said.startswith("error: ") and option in said, (option, value, said)
        assert (value or repr(value)) in said and len(said.splitlines()) == 1, (option, value, said)
    assert len(mlflow.search_runs(search_all_experiments=True, output_format="list")) == runs


def test_the_table_is_long() -> None:
    assert len(list(cases())) > 250


@pytest.mark.parametrize("command", ["run", "train", "ablate", "sweep", "predict"])
def test_an_address_of_a_cluster_needs_the_executor(command: str, cli) -> None:
    words = [*REQUIRED.get(command, []), "--ray-address", "head:6379"]
    words += ["--param", "seed=1,2"] if command == "sweep" else []
    result = cli(command, *words)
    assert result.exit_code == 2 and "--ray-address is for --executor ray" in result.output


@pytest.mark.parametrize("command", sorted(main.commands))
def test_unknown_options_are_named(command: str, cli) -> None:
    result = cli(command, "--no-such-option", 1)
    assert result.exit_code == 2
    assert "No such option" in result.output and "--no-such-option" in result.output


@pytest.mark.parametrize(
    ("words", "meant"),
    [
        (["run", "--epoch", 3], "--epochs"),
        (["run", "--batchsize", 3], "--batch-size"),
        (["train", "--varient", "v3"], "--variant"),
        (["prepare", "--duplicate", "near"], "--duplicates"),
        (["promote", "--selection", "test"], "--select-by"),
        (["trian"], "train"),
    ],
)
def test_what_was_meant_is_suggested(words: list[object], meant: str, cli) -> None:
    result = cli(*words)
    assert result.exit_code == 2
    assert result.output.startswith("error: ") and meant in result.output


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--patience", 3, "--validation-fraction", 0], "patience=3 needs validation images"),
        (["--checkpoint", "best", "--validation-fraction", 0, "--patience", 0], "checkpoint=best"),
        (["--variant", "v5", "--fine-tune", "top"], "loader=features computes the backbone once"),
        (["--feature-views", 4], "feature_views=4 are augmented views for loader=features"),
        (["--variant", "v5", "--feature-views", 2], "set it to 1"),
        (["--test-file", "x.csv", "--test-fraction", 0.2], "leave --test-fraction out"),
        (["--weights", "/no/such.weights.h5"], "/no/such.weights.h5"),
        (["--image-root", "/no/such"], "--image-root"),
        (["--variant", "v6", "--workers", 2], "--workers is for --executor ray"),
        (["--ray-address", "head:6379"], "--ray-address is for --executor ray"),
        (["--variant", "v3", "--executor", "ray"], "--loader stream does not use: take v5 to v7"),
    ],
)
def test_what_does_not_go_together_is_said(
    words: list[object], said: str, store: str, tiny_raw, cli
) -> None:
    result = cli("run", "--data", tiny_raw, "--experiment", "impossible", *words)
    assert result.exit_code == 2 and said in result.output, result.output
    assert result.output.splitlines()[-1].startswith("error: ")
    found = mlflow.get_experiment_by_name("impossible")
    ids = [] if found is None else [found.experiment_id]
    runs = mlflow.search_runs(ids, output_format="list") if ids else []
    assert [run.info.status for run in runs if run.info.status != "FAILED"] == []
