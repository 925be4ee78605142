"""README and docs: their links lead somewhere, and their Python runs as printed."""

import re
from pathlib import Path

import keras
import pytest
from PIL import Image

from har.inference.classifier import load_classifier, save_classifier
from har.models.build import build_model
from tests.fixtures import CLASSES, tiny_recipe

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def anchors(page: Path) -> set[str]:
    """As GitHub makes them from headings."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    kept = [re.sub(r"[^\w\- ]", "", heading.lower()) for heading in headings]
    return {each.replace(" ", "-") for each in kept}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if "://" not in link:
            file, _, anchor = link.partition("#")
            target = (page.parent / file).resolve() if file else page
            assert target.exists(), link
            assert not anchor or anchor in anchors(target), link


def test_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 220


def python_blocks(page: str) -> list[str]:
    return re.findall(r"```python\n(.*?)\n```", (ROOT / page).read_text(), re.DOTALL)


@pytest.mark.parametrize("variant", ["original", "v3"])
def test_the_classifier_folder_is_used_as_printed(
    variant: str, tiny_backbone: None, raw: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tiny_recipe(variant, weights="random")
    keras.utils.set_random_seed(1)
    model = build_model(recipe, len(CLASSES))
    save_classifier(Path("classifier"), model, CLASSES, recipe)
    with Image.open(raw / "train" / "Image_1.jpg") as picture:
        picture.save("photo.jpg")
    (row,) = load_classifier(Path("classifier")).classify([Path("photo.jpg").read_bytes()])
    ours, plain, lite = python_blocks("docs/serving.md")
    exec(compile(ours, "ours", "exec"), {})
    assert capsys.readouterr().out.strip() == str([row])
    exec(compile(plain, "plain", "exec"), {})
    assert capsys.readouterr().out.splitlines() == [
        f"{each['label']} {each['probability']:.1%}" for each in row["top_3"]
    ]
    exec(compile(lite, "lite", "exec"), {})
    assert Path("model.tflite").stat().st_size > 1000
