"""The repository itself: its lists agree, its imports point downward, its README is true."""

import ast
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from click import Command

from har.cli.main import main
from har.notebooks import describe_variants

ROOT = Path(__file__).parents[2]


PACKAGES = sorted(path.parent.name for path in (ROOT / "har").glob("*/__init__.py"))
MODULES = sorted((ROOT / "har").rglob("*.py"))


def lint_imports(folder: Path) -> subprocess.CompletedProcess[str]:
    """What `make check` says of the imports of a copy of the package in `folder`."""
    command = [str(Path(sys.executable).with_name("lint-imports")), "--no-cache"]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def copied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package and its contracts, for a test to break."""
    folder = tmp_path_factory.mktemp("copied")
    shutil.copytree(ROOT / "har", folder / "har", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", folder)
    return folder


def test_imports_point_downward(copied: Path) -> None:
    done = lint_imports(copied)
    assert done.returncode == 0 and "4 kept, 0 broken" in done.stdout, done.stdout


@pytest.mark.parametrize(
    ("module", "planted", "contract"),
    [
        ("data/images.py", "from har.models import devices", "Each package imports only"),
        ("util/files.py", "def f():\n    from har import recipe", "Each package imports only"),
        ("compare/twins.py", "from har.serving import load", "Each package imports only"),
        ("other/__init__.py", "", None),
        ("data/images.py", "from har.data import prepare", "No two modules"),
        ("training/train.py", "def f():\n    import mlflow", "MLflow starts in tracking"),
        ("recipe.py", "import numpy", "Recipes and tools know no framework"),
    ],
)
def test_a_planted_import_breaks_its_contract(
    copied: Path, module: str, planted: str, contract: str | None
) -> None:
    file = copied / "har" / module
    before = file.read_text() if file.exists() else None
    file.parent.mkdir(exist_ok=True)
    file.write_text(f"{before or ''}\n{planted}\n")
    try:
        done = lint_imports(copied)
    finally:
        if before is None:
            shutil.rmtree(file.parent)
        else:
            file.write_text(before)
    assert done.returncode == 1
    said = " ".join(done.stdout.split())
    if contract is None:
        assert "not listed as layers" in said, said
    else:
        # of this very contract: each ends in one of the two words
        assert re.search(rf"{contract}((?!KEPT|BROKEN).)* BROKEN", said), said


def test_tests_mirror_the_packages() -> None:
    assert len(PACKAGES) == 12
    for package in PACKAGES:
        tests = sorted((ROOT / "tests" / package).glob("test_*.py"))
        assert tests, f"no tests of har/{package}"
        for each in tests:
            module = each.name.removeprefix("test_")
            assert (ROOT / "har" / package / module).is_file(), f"{each} mirrors no module"


def test_functions_are_short() -> None:
    lengths = {
        f"{path.relative_to(ROOT)}: {node.name}": node.end_lineno - node.lineno + 1
        for path in MODULES
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef) and node.end_lineno is not None
    }
    assert len(lengths) > 500
    assert [name for name, lines in lengths.items() if lines > 45] == []


def test_packages_export_nothing() -> None:
    assert all((ROOT / "har" / name / "__init__.py").read_text() == "" for name in PACKAGES)


def requirements_of_conda() -> list[str]:
    conda = yaml.safe_load((ROOT / "conda.yaml").read_text())
    assert conda["dependencies"][:2] == ["python=3.11", "pip"]
    return conda["dependencies"][2]["pip"]


def test_conda_and_pyproject_agree_but_for_cuda() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    conda = requirements_of_conda()
    plain = [line for line in conda if not line.startswith("tensorflow")]
    ours = [d for d in project["dependencies"] if not d.startswith("tensorflow")]
    extras = project["optional-dependencies"]
    assert plain == ours + extras["audit"] + extras["sweep"]
    (ours,) = (d for d in project["dependencies"] if d.startswith("tensorflow"))
    (cuda,) = project["optional-dependencies"]["cuda"]
    assert cuda == ours.replace("tensorflow", "tensorflow[and-cuda]")
    assert [line.split(";")[0] for line in conda if line.startswith("tensorflow")] == [cuda, ours]
    assert not [line for line in conda if re.match(r"(har\b|-e|\.)", line)]


def entry_points() -> dict[str, dict]:
    return yaml.safe_load((ROOT / "MLproject").read_text())["entry_points"]


@pytest.mark.parametrize("name", entry_points())
def test_entry_points_forward_everything_they_declare(name: str) -> None:
    entry = entry_points()[name]
    words = entry["command"].split()
    command = main.commands["run" if name == "main" else name.replace("_", "-")]
    assert isinstance(command, Command)
    assert words[:4] == ["python", "-m", "har", command.name]
    options = {opt: param for param in command.params for opt in param.opts}
    pairs = dict(zip(words[4::2], words[5::2], strict=True))
    assert pairs == {f"--{name}": f"{{{name}}}" for name in entry["parameters"]}
    for parameter, declared in entry["parameters"].items():
        option = options[f"--{parameter}"]
        assert (
            option.required if "default" not in declared else option.default == declared["default"]
        )


def blocks(language: str) -> list[str]:
    pages = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
    text = "\n".join(page.read_text() for page in pages)
    return re.findall(rf"```{language}\n(.*?)\n```", text, re.DOTALL)


def test_docs_show_the_variants_as_printed() -> None:
    assert describe_variants() in blocks("text")


def test_docs_name_only_options_that_exist() -> None:
    known = {opt for command in main.commands.values() for p in command.params for opt in p.opts}
    known.add("--help")
    for line in "\n".join(blocks("sh")).splitlines():
        if line.startswith(("har ", "python -m har ")):
            assert set(re.findall(r"(?<=\s)--[a-z-]+", line)) <= known, line


def test_make_help_names_every_target() -> None:
    shown = subprocess.run(
        ["make", "--no-print-directory", "help"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert {line.split()[0] for line in shown.stdout.splitlines()} == set(targets)


def test_no_image_is_committed_but_the_readmes() -> None:
    files = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    pictures = [f for f in files if f.lower().endswith((".jpg", ".jpeg", ".webp", ".bmp"))]
    assert pictures == []
    assert all((ROOT / file).stat().st_size < 500_000 for file in files if (ROOT / file).exists())
