"""What no loader can read is named, with the reason."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import tensorflow as tf

from har.data.layouts import folder_source
from har.data.prepare import prepare
from har.data.splits import Split
from har.training import bad_images
from har.training.bad_images import name_bad_images
from har.training.loaders import build_stream_loader
from har.util.errors import UserError
from tests.data.making import encode, gradient
from tests.fixtures import tiny_recipe

DECODERS = {
    # as an earlier version may have noted it
    "for Pillow, given to TensorFlow": (encode(gradient(), "BMP")[:-9], True, "truncated"),
    "for Pillow only": (encode(gradient(), "WEBP"), True, "TensorFlow cannot decode it"),
    "cut after its check": (encode(gradient())[:700], False, "truncated"),
    "no image": (b"<html>", False, "an HTML page"),
}


@pytest.mark.parametrize("name", DECODERS)
def test_an_image_that_no_loader_reads_is_named(
    name: str, raw: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, plain, message = DECODERS[name]
    manifest = prepare(folder_source(raw, why="a test"), tmp_path / "out", Split())
    table = manifest.table.copy()
    table["plain_jpeg"] = table["plain_jpeg"].astype(bool)
    table.loc[5, "plain_jpeg"] = plain
    changed = replace(manifest, table=table)
    bad = manifest.root / table.loc[5, "path"]
    bad.write_bytes(data)
    # the bytes are those that were prepared
    monkeypatch.setattr(bad_images, "check_images", lambda manifest: None)
    expected = f"{re.escape(str(bad))}.*{message}.*run `har prepare` again"
    with pytest.raises(UserError, match=expected), name_bad_images(changed):
        for _ in build_stream_loader(changed, table, tiny_recipe())(
            tf.data.Dataset.range(len(table)), 8, False
        ):
            pass
