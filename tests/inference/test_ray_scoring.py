"""What Ray's tasks and actors compute, without Ray."""

import os
from pathlib import Path

import numpy as np
import pytest

from har.data.manifest import Manifest
from har.inference.classifier import load_classifier, save_classifier
from har.inference.image_rows import Row
from har.inference.inputs import Input, pack_inputs, unpack_inputs
from har.inference.ray_scoring import BLOCK, Batch, Scorer, cut_blocks, decode_batch
from har.models.build import build_model
from har.util.places import Url
from tests.fixtures import tiny_recipe


def pack(inputs: list[Input]) -> Batch:
    """A batch as Ray hands it on: of arrays."""
    found = {name: np.array(values) for name, values in pack_inputs(inputs).items()}
    found["place"] = np.array(pack_inputs(inputs)["place"], object)
    return {"number": np.arange(len(inputs)), **found}


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
    batch = pack([*paths, bad, tmp_path / "gone.jpg"])
    whole = scorer(batch)
    apart = scorer(decode_batch(batch, recipe.resize, recipe.served_size))
    for name in ("number", "label", "error", "where"):
        assert whole[name].tolist() == apart[name].tolist()
    np.testing.assert_allclose(apart["probability"], whole["probability"], atol=1e-6)
    assert [bool(each) for each in whole["error"]] == [False] * 5 + [True] * 2
    # not an image at all
    assert scorer(decode_batch(pack([bad]), recipe.resize, recipe.served_size))["label"] == [""]


def test_what_travels_comes_back() -> None:
    inputs: list[Input] = [
        Path("a/b.jpg"),
        Path(os.fsdecode(b"/caf\xe9 \n.jpg")),
        Url("s3://bucket/a b?#%20.jpg"),
        Row(Url("s3://bucket/t.parquet"), 3, 70_000),
        Row(Path("t.parquet"), 0, 0),
    ]
    assert unpack_inputs(pack(inputs)) == inputs


def test_blocks_give_each_worker_something_and_keep_rows_together() -> None:
    files: list[Input] = [Path(str(n)) for n in range(3 * BLOCK)]
    assert [len(each) for each in cut_blocks(files, range(3 * BLOCK), 2)] == [BLOCK] * 3
    assert cut_blocks(files, [5, 7, 9], 2) == [[5, 7], [9]]
    table = Path("t.parquet")
    groups: list[Input] = [Row(table, group, at) for group in (0, 1) for at in range(500)]
    assert [(each[0], len(each)) for each in cut_blocks(groups, range(1000), 2)] == [
        (0, 500),
        (500, 500),
    ]
    # one group is cut, but into no more parts than there are workers
    one: list[Input] = [Row(table, 0, at) for at in range(1000)]
    blocks = cut_blocks(one, range(1000), 4)
    assert [len(each) for each in blocks] == [250] * 4
    assert [number for each in blocks for number in each] == list(range(1000))
