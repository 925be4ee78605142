"""What Ray's tasks and actors compute, without Ray."""

import os
from pathlib import Path

import numpy as np
import pytest

from har.data.manifest import Manifest
from har.inference.classifier import load_classifier, save_classifier
from har.inference.ray_scoring import Scorer, decode_batch
from har.models.build import build_model
from tests.conftest import tiny_recipe


@pytest.mark.usefixtures("tiny_backbone")
def test_images_decoded_apart_get_the_rows_of_one_actor(manifest: Manifest, tmp_path: Path) -> None:
    """As beside a GPU: tasks decode, and an actor only computes."""
    recipe = tiny_recipe("v5", weights="random")
    save_classifier(tmp_path, build_model(recipe, 3), manifest.class_names, recipe)
    scorer = object.__new__(Scorer)
    scorer.classifier, scorer.where = load_classifier(tmp_path), "here"
    bad = tmp_path / os.fsdecode(b"caf\xe9.jpg")
    bad.write_bytes(b"no image")
    paths = [manifest.root / path for path in manifest.table["path"][:5]]
    names = [os.fsencode(path) for path in (*paths, bad, tmp_path / "gone.jpg")]
    batch = {"number": np.arange(len(names)), "path": np.array(names, object)}
    whole = scorer(batch)
    apart = scorer(decode_batch(batch, recipe.resize, recipe.served_size))
    for name in ("number", "label", "error", "where"):
        assert whole[name].tolist() == apart[name].tolist()
    np.testing.assert_allclose(apart["probability"], whole["probability"], atol=1e-6)
    assert [bool(each) for each in whole["error"]] == [False] * 5 + [True] * 2
    # not an image at all
    only_bad = {"number": np.arange(1), "path": np.array(names[-1:], object)}
    assert scorer(decode_batch(only_bad, recipe.resize, recipe.served_size))["label"] == [""]
