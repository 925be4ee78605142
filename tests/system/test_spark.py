"""docs/scaling.md's recipe for Spark, as printed."""

import os
import shutil
import sys
from pathlib import Path
from typing import Any

import keras
import mlflow
import pandas as pd
import pytest
from mlflow import MlflowClient

from har.inference.classifier import load_classifier, save_classifier
from har.models.build import build_model
from har.serving.package import log_classifier
from tests.fixtures import CLASSES, tiny_recipe

PAGE = Path(__file__).parents[2] / "docs" / "scaling.md"


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("java") is None, reason="Spark needs Java")
def test_the_champion_classifies_a_table_of_files(
    tiny_backbone: None, raw: Path, store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("pyspark")
    monkeypatch.setenv("PYSPARK_PYTHON", sys.executable)
    monkeypatch.setenv("SPARK_LOCAL_IP", "127.0.0.1")
    recipe = tiny_recipe("v3", weights="random")
    keras.utils.set_random_seed(1)
    save_classifier(Path("classifier"), build_model(recipe, len(CLASSES)), CLASSES, recipe)
    mlflow.set_experiment("spark")
    with mlflow.start_run():
        model_id = log_classifier(Path("classifier"))
    version = mlflow.register_model(f"models:/{model_id}", "har").version
    MlflowClient().set_registered_model_alias("har", "champion", version)
    shutil.copytree(raw / "train", "photos")
    Path("photos", "bad.jpg").write_bytes(b"junk")
    (recipe_as_printed,) = (
        each.partition("\n```")[0] for each in PAGE.read_text().split("```python\n")[1:]
    )
    names: dict[str, Any] = {}
    try:
        exec(compile(recipe_as_printed, str(PAGE), "exec"), names)
        plan = names["labels"]._jdf.queryExecution().executedPlan().toString()
    finally:
        if "spark" in names:
            names["spark"].stop()
    # an image is classified once, although three columns come from it
    assert plan.count("ArrowEvalPython") == 1
    found = pd.read_parquet("labels")
    found["name"] = [os.path.basename(path) for path in found["path"]]
    assert sorted(found["name"]) == sorted(os.listdir("photos"))
    bad = found["name"] == "bad.jpg"
    assert found.loc[bad, ["label", "probability"]].isna().all(axis=None)
    assert found.loc[bad, "error"].str.contains("not an image").all()
    assert found.loc[~bad, "error"].isna().all()
    files = [Path("photos", name).read_bytes() for name in found.loc[~bad, "name"]]
    expected = load_classifier(Path("classifier")).classify(files)
    assert found.loc[~bad, "label"].tolist() == [each["label"] for each in expected]
    assert found.loc[~bad, "probability"].tolist() == pytest.approx(
        [each["probability"] for each in expected], abs=1e-6
    )
