"""The parts that benchmarks share, and each command once in its tiny form: does it run at all."""

import ast
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import get_args

import pytest

import backbones
import feature_extraction
import input_pipeline
import measuring
import training_epoch
from har.recipe import Backbone
from measuring import Claim
from tests.fixtures import tiny_recipe, write_images

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
COMMANDS = sorted(
    path
    for path in BENCHMARKS.glob("*.py")
    if path.stem not in ("measuring", "internals", "services")
)


def test_functions_are_short() -> None:
    for path in BENCHMARKS.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno is not None
                assert node.end_lineno - node.lineno + 1 <= 45, f"{path.name}: {node.name}"


@pytest.mark.parametrize(
    ("measured", "relation", "met"),
    [(0.9, ">=", True), (0.89, ">=", False), (0.9, "<=", True), (0.91, "<=", False)],
)
def test_a_report_is_printed_and_written_and_sets_the_status(
    measured: float,
    relation: str,
    met: bool,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def measure(data: str, scratch: Path, tiny: bool) -> tuple[measuring.Tables, list[Claim]]:
        assert (data, tiny) == (str(tmp_path), True) and scratch.is_dir()
        rows = [{"name": "a", "images/s": 1234.5}, {"name": "b", "minutes": 1.234}]
        return {"speed": rows}, [Claim("a / b", measured, relation, 0.9)]

    out = tmp_path / "found" / "out.json"
    words = ["x.py", "--data", str(tmp_path), "--out", str(out), "--tiny"]
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit) as status:
        measuring.run("x.py", "Measure.", measure)
    assert status.value.code == (0 if met else 1)
    printed = capsys.readouterr().out
    assert "speed  images/s  minutes\na         1,234\nb                   1.23\n" in printed
    assert f"  {'yes' if met else 'NO'}\n" in printed
    found = json.loads(out.read_text())
    assert found["tables"]["speed"][0] == {"name": "a", "images/s": 1234.5}
    assert found["claims"][0]["met"] is met


def test_ratios_are_taken_within_a_turn_and_the_first_turn_does_not_count() -> None:
    # the first turn compiles, the third one was disturbed, for both alike
    rates = {"a": iter((1.0, 100.0, 10.0, 90.0)), "b": iter((9.0, 50.0, 5.0, 60.0))}
    calls = {name: lambda each=each: {"rate": next(each)} for name, each in rates.items()}
    turns = measuring.take_turns(calls, 3)
    assert measuring.median_ratio(turns, "rate", "a", "b") == pytest.approx(2)
    assert measuring.summarise(turns) == [{"name": "a", "rate": 90}, {"name": "b", "rate": 50}]


def test_memory_is_watched_while_it_is_taken() -> None:
    taken = []

    def take() -> None:
        taken.append(bytearray(b"x") * 50_000_000)
        time.sleep(0.1)

    seconds, grown_mb = measuring.watched(take)
    assert seconds >= 0.1 and 40 < grown_mb < 80


def test_images_are_repeated_under_other_names(manifest, tmp_path: Path) -> None:
    count = 2 * len(manifest.table) + 3
    folder = measuring.repeat_images(manifest, count, tmp_path / "many")
    lines = (folder / "Training_set.csv").read_text().splitlines()
    assert lines[0] == "filename,label" and len(set(lines)) == count + 1
    assert len(list((folder / "train").iterdir())) == count
    by_content = {path.read_bytes() for path in (folder / "train").iterdir()}
    assert len(by_content) == len(manifest.table)


def test_every_way_to_read_takes_its_turn(manifest) -> None:
    turns = input_pipeline._measure_speed(manifest, turns=1)
    assert {"stream", input_pipeline.TF_LOOP, input_pipeline.PIL_LOOP} < set(turns)
    assert all(each["images/s"] > 0 for (each,) in turns.values())


def test_the_parts_of_a_training_epoch_take_turns(
    manifest, tiny_backbone: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = tiny_recipe("v3", strategy="one_device")
    fits = {training_epoch.AS_IT_IS: (recipe, 1), training_epoch.AUTOTUNED: (recipe, 2)}
    monkeypatch.setattr(training_epoch, "V3", recipe)
    monkeypatch.setattr(training_epoch, "FITS", fits)
    turns = training_epoch._measure_fits(manifest, steps=2, turns=2)
    assert len(turns) == 4 and all(len(each) == 2 for each in turns.values())


def test_features_have_an_accuracy(manifest, tiny_backbone: None) -> None:
    row = backbones._measure_costs(manifest, "efficientnet-lite0", turns=1)
    assert set(backbones.SIZES) == set(get_args(Backbone))
    assert row["GFLOP"] > 0 and row["parameters"] > 0
    assert all(row[f"images/s, {each}"] > 0 for each in ("tensorflow", "openvino"))
    assert "%" in backbones._measure_accuracy(manifest, "efficientnet-lite0")


def test_extraction_and_forward_pass_take_turns(manifest, tiny_backbone: None) -> None:
    row = feature_extraction._measure_speed(manifest, "efficientnet-lite0", "tensorflow", turns=1)
    assert row["extraction"] > 0 and row["bare"] > 0 and 0 < row["limit"] < 1


def run_command(path: Path, folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(path), *options]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


def test_a_wrong_folder_is_named(tmp_path: Path) -> None:
    ran = run_command(BENCHMARKS / "backbones.py", tmp_path, "--data", str(tmp_path / "none"))
    assert ran.returncode == 2
    assert "none" in ran.stderr and "Traceback" not in ran.stderr


@pytest.mark.slow
@pytest.mark.parametrize("path", COMMANDS, ids=lambda p: p.stem)
def test_the_command_prints_tables_and_writes_them(path: Path, tmp_path: Path) -> None:
    data, out = write_images(tmp_path / "images", per_class=80), tmp_path / "out.json"
    ran = run_command(path, tmp_path, "--data", str(data), "--out", str(out), "--tiny")
    assert out.is_file(), ran.stderr
    found = json.loads(out.read_text())
    # so little shows no speed, but nothing may be lost
    met = all(claim["met"] for claim in found["claims"])
    assert ran.returncode == (0 if met else 1)
    assert met or path.stem != "faults", ran.stdout
    for title, rows in found["tables"].items():
        assert title in ran.stdout and all(row["name"] in ran.stdout for row in rows)
    # nothing is left in the working folder
    assert {each.name for each in tmp_path.iterdir()} == {"images", "out.json"}
