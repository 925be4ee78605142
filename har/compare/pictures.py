"""Pictures of the test images in a comparison: never a file only because a store names it.

What a store says of a folder and of files is not believed: whoever wrote there could name any file,
and the report goes back into the store. A picture is shown only if its bytes have the digest that
the run recorded, or lie in the folder that the user named.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from har.data.images import ImageError, read_image
from har.data.manifest import SUMMARY_FILE
from har.data.pictures import encode_thumbnail
from har.tracking.artifacts import UNREADABLE, read_json_artifact
from har.tracking.query import load_image_table
from har.util.errors import first_line
from har.util.files import digest_bytes, expand_home
from har.util.progress import warn


@dataclass(frozen=True, kw_only=True)
class RecordedImages:
    """The images of a run: `root` is their folder, None where unknown; `digests` maps paths below
    it to the SHA-256 of files. If the user `named` the folder, a missing digest is no obstacle.
    """

    root: Path | None
    digests: dict[str, str] = field(default_factory=dict)
    named: bool = False

    def thumbnail_uri(self, path: str) -> str:
        """Return an image's thumbnail as a data URI; "" if the recorded image is not here."""
        known = self.digests.get(path, "")
        if self.root is None or not (known or self.named):
            return ""
        try:
            data = read_image(self.root / path, inside=self.root)
        except ImageError:
            return ""
        return "" if known and digest_bytes(data) != known else encode_thumbnail(data)


def find_recorded_images(run_id: str, named: Path | None = None) -> RecordedImages:
    """Find the images of a run in the folder `named`, or else in the one that the run recorded."""
    try:
        table = load_image_table(run_id, ["path", "sha256"])
        return RecordedImages(
            root=named or _read_root(run_id),
            digests=dict(zip(table["path"], table["sha256"], strict=True)),
            named=named is not None,
        )
    except UNREADABLE as error:
        warn(f"left out: what images run {run_id} recorded: {first_line(error)}")
        return RecordedImages(root=named, named=named is not None)


def _read_root(run_id: str) -> Path:
    described: Any = read_json_artifact(run_id, SUMMARY_FILE)
    root = Path(expand_home(described["root"]))
    if not root.is_absolute():
        raise ValueError(f"its folder {described['root']!r} is no absolute path")
    return root
