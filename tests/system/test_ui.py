"""The real MLflow UI in a real browser: what someone sees who opens the runs for the first time.

The screenshots stay in pytest's temporary folder (printed with -s), to be looked at.
"""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

import mlflow
import pytest
from playwright.sync_api import Page, expect, sync_playwright

from har.data.manifest import Manifest
from har.jobs.compare import run_comparison
from har.jobs.import_notebooks import import_notebooks
from har.jobs.prepare import run_preparation
from har.jobs.train import run_training
from har.models import backbones
from har.models.backbones import Backbone
from har.notebooks import NOTEBOOKS
from har.tracking.ui import VIEW
from har.training.job import build_job
from tests.fixtures import build_tiny, free_port, new_store, serving, tiny_recipe

pytestmark = pytest.mark.browser


# The page is a megabyte of JavaScript, and this may be a slow machine.
PATIENCE_MS = 60_000


@pytest.fixture(scope="module")
def runs(
    manifest: Manifest, tiny_raw: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, mlflow.entities.Run]]:
    """A store with a preparation, two trainings, the published runs and a comparison, by name."""
    folder = tmp_path_factory.mktemp("ui")
    before = mlflow.get_tracking_uri()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setitem(backbones.BACKBONES, "efficientnet-lite0", Backbone(build_tiny, build_tiny))
        mlflow.set_tracking_uri(new_store(folder))
        run_preparation(str(tiny_raw), {"test_fraction": 0.25}, None, folder / "out", "har", 0.0)
        for variant in ("v2", "original"):
            recipe = tiny_recipe(variant)
            job = build_job(variant, recipe, ("backbone",), manifest)
            run_training(job, "har", started=0.0)
        import_notebooks("har")
        run_comparison([], "har", folder / "comparison")
        found = mlflow.search_runs(experiment_names=["har"], output_format="list")
        yield {run.info.run_name: run for run in found}
    mlflow.set_tracking_uri(before)


@pytest.fixture(scope="module")
def address(
    runs: dict[str, mlflow.entities.Run], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[str]:
    command = ["mlflow", "server", "--workers", "1"]
    command += ["--backend-store-uri", mlflow.get_tracking_uri()]
    log = tmp_path_factory.mktemp("ui-server") / "log"
    with serving(command, free_port(), log, MLFLOW_SERVER_ENABLE_JOB_EXECUTION="false") as found:
        yield found


@pytest.fixture
def page(address: str, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Page]:
    names = ("chromium", "chromium-browser", "google-chrome")
    program = next(filter(None, map(shutil.which, names)), None)
    if program is None:
        pytest.skip("needs Chromium on PATH")
    with sync_playwright() as playwright:
        # it may be root who runs this
        browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1700, "height": 1000}, base_url=address)
        page.set_default_timeout(PATIENCE_MS)
        expect.set_options(timeout=PATIENCE_MS)
        yield page
        picture = tmp_path / f"{request.node.name}.png"
        page.screenshot(path=picture)
        print(f"screenshot: {picture}")
        browser.close()


def experiment(runs: dict[str, mlflow.entities.Run]) -> str:
    return str(next(iter(runs.values())).info.experiment_id)


V2, ORIGINAL, PREPARE = "v2 · lite0 · 1xCPU", "original · lite0 · 1xCPU", "prepare · images"


COMPARE = "compare · 7 runs"


PUBLISHED = {f"{name} · b7 · {each.hardware}" for name, each in NOTEBOOKS.items()}


def test_view_of_results(page: Page, runs: dict[str, mlflow.entities.Run]) -> None:
    assert set(runs) == {V2, ORIGINAL, PREPARE, COMPARE} | PUBLISHED
    page.goto(f"/#/experiments/{experiment(runs)}/runs?viewStateShareKey={VIEW}")
    for name in (V2, ORIGINAL, *PUBLISHED):
        expect(page.get_by_role("link", name=name)).to_be_visible()
    for name in (PREPARE, COMPARE):
        expect(page.get_by_text(name)).to_have_count(0)  # it has no accuracy to compare
    # a grid draws only the columns in sight
    for column in ("accuracy", "accuracy_low", "accuracy_high", "top_3_accuracy"):
        header = page.locator("[role=columnheader]").get_by_text(column, exact=True)
        expect(header).to_be_visible()
    shown = page.locator("[role=row]", has_text=V2).last
    expect(page.get_by_text(f"{runs[V2].data.metrics['accuracy']}"[:8]).first).to_be_visible()
    expect(shown).to_be_visible()


def test_the_view_is_offered_in_the_menu(page: Page, runs: dict[str, mlflow.entities.Run]) -> None:
    page.goto(f"/#/experiments/{experiment(runs)}/runs")
    for name in runs:
        expect(page.get_by_role("link", name=name)).to_be_visible()
    expect(page.get_by_text(f"Choose Views > {VIEW}")).to_be_visible()
    page.get_by_role("button", name="Views").click()
    expect(page.get_by_text(VIEW, exact=True)).to_be_visible()


def test_charts_have_no_noise_among_model_metrics(
    page: Page, runs: dict[str, mlflow.entities.Run]
) -> None:
    page.goto(f"/#/experiments/{experiment(runs)}/runs?compareRunsMode=CHART")
    expect(page.get_by_text("Model metrics").first).to_be_visible()
    for name in (V2, ORIGINAL):
        expect(page.get_by_text(name).first).to_be_visible()
    expect(page.get_by_text("accuracy", exact=True).first).to_be_visible()
    for noise in ("duplicate_groups", "images", "strays"):
        expect(page.get_by_text(noise, exact=True)).to_have_count(0)


def test_compare_page_shows_what_differs(page: Page, runs: dict[str, mlflow.entities.Run]) -> None:
    ids = json.dumps([runs[name].info.run_id for name in (V2, ORIGINAL)])
    experiments = json.dumps([experiment(runs)])
    page.goto(f"/#/compare-runs?runs={quote(ids)}&experiments={quote(experiments)}")
    expect(page.get_by_text("Comparing 2 Runs from 1 Experiment")).to_be_visible()
    for name in (V2, ORIGINAL):
        expect(page.get_by_text(name).first).to_be_visible()
    rows = page.locator("tr", has_text="recipe.head")
    expect(rows.first).to_contain_text("gap_dropout")
    expect(rows.first).to_contain_text("flatten_dense512")


def test_run_page_shows_description_with_its_picture(
    page: Page, runs: dict[str, mlflow.entities.Run]
) -> None:
    run = runs[V2]
    page.goto(f"/#/experiments/{experiment(runs)}/runs/{run.info.run_id}")
    expect(page.get_by_text("v2 on 1xCPU", exact=False)).to_be_visible()
    page.get_by_text("Show more").first.click()
    picture = page.locator("img[src*='confusion_matrix']")
    expect(picture).to_be_visible()
    loaded = "image => new Promise(done => image.complete ? done() : image.onload = done)"
    picture.evaluate(loaded)
    assert picture.evaluate("image => image.naturalWidth") > 200
    for name in ("job", "variant", "hardware", "test_digest"):
        expect(page.get_by_role("status", name=name, exact=True)).to_be_attached()


def test_artifact_view_shows_the_report(page: Page, runs: dict[str, mlflow.entities.Run]) -> None:
    run_id = runs[PREPARE].info.run_id
    page.goto(f"/#/experiments/{experiment(runs)}/runs/{run_id}/artifacts/report.html")
    report = page.frame_locator("iframe").first
    expect(report.get_by_role("heading", name="Groups of copies")).to_be_attached()
    expect(report.get_by_role("cell", name="42 of 3 classes")).to_be_visible()


def test_artifact_view_shows_the_comparison(
    page: Page, runs: dict[str, mlflow.entities.Run]
) -> None:
    run_id = runs[COMPARE].info.run_id
    page.goto(f"/#/experiments/{experiment(runs)}/runs/{run_id}/artifacts/report.html")
    report = page.frame_locator("iframe").first
    expect(report.get_by_role("heading", name="Comparison of 7 runs")).to_be_visible()
    for name in (V2, ORIGINAL):
        cell = report.get_by_role("region", name="All runs").get_by_text(name, exact=True)
        expect(cell).to_be_attached()


@pytest.mark.parametrize("width", [1280, 390])
def test_comparison_needs_nothing_and_fits(
    page: Page, runs: dict[str, mlflow.entities.Run], tmp_path: Path, width: int
) -> None:
    uri = f"runs:/{runs[COMPARE].info.run_id}/report.html"
    file = mlflow.artifacts.download_artifacts(uri, dst_path=str(tmp_path))
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.set_viewport_size({"width": width, "height": 844})
    page.goto(Path(file).as_uri())
    expect(page.get_by_role("heading", name="Every pair on the same images")).to_be_attached()
    assert [url for url in asked if not url.startswith(("file:", "data:"))] == []
    # tables and pictures scroll inside the page, not the page with them
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    unnamed = "[...document.images].filter(image => !image.alt || !image.naturalWidth).length"
    assert page.evaluate(unnamed) == 0
    picture = tmp_path / f"comparison-{width}.png"
    page.screenshot(path=picture, full_page=True)
    print(f"screenshot: {picture}")
