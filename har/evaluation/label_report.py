"""The page of `har audit-labels`: the images whose label is in doubt, the strongest doubt first."""

from functools import partial
from pathlib import Path

from har.data.manifest import Manifest
from har.data.pictures import render_page, thumbnail_uri
from har.training.audit import Audit

TEMPLATE = Path(__file__).with_name("label_report.html")
SUSPECTS_FILE = "suspects.csv"
# What the page shows at most: so it has about a MB whatever the data.
MAX_PICTURES, MAX_CLASSES = 200, 50


def render_label_report(found: Audit, manifest: Manifest, command: str, train_command: str) -> str:
    """Render the page; `command` made it, and `train_command` trains without the suspects."""
    return render_page(
        TEMPLATE,
        found=found,
        manifest=manifest,
        not_audited=manifest.summary.images_by_split.get("unused", 0),
        shown=found.suspects.head(MAX_PICTURES).to_dict("records"),
        classes=found.by_class.head(MAX_CLASSES).to_dict("records"),
        command=command,
        train_command=train_command,
        suspects_file=SUSPECTS_FILE,
        thumbnail_uri=partial(thumbnail_uri, manifest.root),
    )
