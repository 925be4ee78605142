"""The page of labels in doubt: bounded, escaped, and honest about what it shows."""

import re
from dataclasses import replace

import pandas as pd

from har.data.manifest import Manifest
from har.evaluation.label_report import MAX_CLASSES, MAX_PICTURES, render_label_report
from har.training.audit import Audit

HOSTILE = "<script>alert('x')</script>\" onerror=\"x"


def audit_of(paths: list[str], label: str = "sitting", suggested: str = "running") -> Audit:
    suspects = pd.DataFrame(
        {
            "path": paths,
            "label": label,
            "suggested": suggested,
            "label_probability": 0.02,
            "suggested_probability": 0.91,
            "score": -0.89,
        }
    )
    by_class = pd.DataFrame({"label": [label], "images": [1000], "suspects": [len(paths)]})
    return Audit(suspects=suspects, by_class=by_class, images=1000, folds=5, accuracy=0.75)


def render(found: Audit, manifest: Manifest) -> str:
    return render_label_report(found, manifest, "har audit-labels --data x", "har run --data x")


def test_the_page_says_what_it_shows(manifest: Manifest) -> None:
    paths = manifest.rows("train")["path"].tolist()[:3]
    page = render(audit_of(paths), manifest)
    words = " ".join(page.split())
    assert "3 of 1,000 labels are in doubt (0.3%)" in words
    assert "A doubt is not an error" in words and "Test images are never touched" in words
    assert "75.0% of the predictions are the label" in words
    assert "har audit-labels --data x" in page and "har run --data x" in page
    assert len(re.findall("data:image/jpeg;base64", page)) == 3
    assert words.count("sitting 2% &rarr; <strong>running</strong> 91%") == 3
    assert all(path in page for path in paths)
    assert not re.findall(r"(src|href)=.https?:", page)


def test_hostile_names_are_escaped(manifest: Manifest) -> None:
    found = audit_of([HOSTILE, "../../../etc/passwd"], HOSTILE, HOSTILE)
    page = render_label_report(found, replace(manifest, name=HOSTILE), HOSTILE, HOSTILE)
    assert "<script" not in page and 'onerror="' not in page
    # title, heading, commands, one class, and each picture's label, suggestion and path
    assert page.count("&lt;script&gt;") == 2 + 2 + 1 + 2 * 2 + 1
    assert page.count("cannot be read") == 2


def test_the_page_is_bounded(manifest: Manifest) -> None:
    paths = manifest.rows("train")["path"].tolist()[:1] * (MAX_PICTURES + 5)
    found = audit_of(paths)
    many = pd.concat([found.by_class] * (MAX_CLASSES + 5))
    page = render(replace(found, by_class=many), manifest)
    assert page.count("<figure>") == MAX_PICTURES
    assert f"the first {MAX_PICTURES} of {MAX_PICTURES + 5}; suspects.csv lists all" in page
    assert page.count("<tr><td>") == MAX_CLASSES
    assert f"The {MAX_CLASSES} of {MAX_CLASSES + 5} classes" in page


def test_nothing_in_doubt(manifest: Manifest) -> None:
    page = render(audit_of([]), manifest)
    assert "<p>None.</p>" in page and "0 of 1,000 labels" in page
