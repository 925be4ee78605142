"""The repository itself: its lists agree, its imports point downward, its README is true."""

import ast
import re
import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml
from click import Command

from har.cli.main import main
from har.notebooks import describe_variants

ROOT = Path(__file__).parents[2]


# Each module may import only from those above it.
ORDER = [
    "errors",
    "files",
    "interrupts",
    "recipe",
    "notebooks",
    "metrics",
    "progress",
    "folding",
    "graphs",
    "runtimes",
    "client",
    "images",
    "manifest",
    "duplicates",
    "splits",
    "sample",
    "sources",
    "feature_cache",
    "labels",
    "prepare",
    "data_report",
    "prediction",
    "devices",
    "efficientnet_lite",
    "backbones",
    "model",
    "extractors",
    "pipeline",
    "extraction",
    "checkpoint",
    "backup",
    "training",
    "classifier",
    "evaluation",
    "figures",
    "robustness",
    "serving",
    "packaging",
    "ui",
    "store",
    "journal",
    "tracking",
    "descriptions",
    "published",
    "archive",
    "twins",
    "ablation",
    "comparison",
    "comparison_figures",
    "comparison_report",
    "recorded",
    "choosing",
    "promotion",
    "trials",
    "experiment",
    "ablation_runs",
    "options",
    "cli",
]


PURE = {
    "errors": set(),
    "recipe": {"errors"},
    "notebooks": {"recipe"},
    "metrics": set(),
    "sample": set(),
    "images": {"errors"},
    "choosing": {"errors", "metrics"},
}


def imports(module: str) -> set[str]:
    """Modules of `har` that one imports, anywhere in its file."""
    found: set[str] = set()
    for node in ast.walk(ast.parse((ROOT / "har" / f"{module}.py").read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("har"):
            name = node.module.removeprefix("har").removeprefix(".")
            found |= {name} if name else {alias.name for alias in node.names}
    return found & set(ORDER)


def test_order_names_every_module() -> None:
    modules = {path.stem for path in (ROOT / "har").glob("*.py")} - {"__init__", "__main__"}
    assert set(ORDER) == modules


@pytest.mark.parametrize("module", ORDER)
def test_imports_point_downward(module: str) -> None:
    below = ORDER[: ORDER.index(module)]
    assert imports(module) <= set(below)


@pytest.mark.parametrize("module", PURE)
def test_the_bottom_stays_pure(module: str) -> None:
    assert imports(module) <= PURE[module]


def test_training_knows_no_mlflow() -> None:
    for module in ("model", "pipeline", "training", "classifier", "evaluation"):
        assert "mlflow" not in (ROOT / "har" / f"{module}.py").read_text()


def test_every_module_has_its_test_file() -> None:
    tests = {path.stem.removeprefix("test_") for path in (ROOT / "tests").glob("test_*.py")}
    # tested through the file named here
    covered_by = {
        "errors": "cli",
        "client": "mlproject",
        "trials": "tracking",
        "experiment": "tracking",
        "recorded": "tracking",
        "packaging": "tracking",
        "store": "tracking",
        "descriptions": "tracking",
        "options": "cli",
        "archive": "comparison",
        "comparison_figures": "comparison",
        "comparison_report": "comparison",
        "ablation_runs": "ablation",
        "choosing": "promotion",
    }
    assert {covered_by.get(name, name) for name in ORDER} <= tests


@pytest.mark.parametrize("path", sorted((ROOT / "har").glob("*.py")), ids=lambda p: p.name)
def test_functions_are_short(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno is not None
            assert node.end_lineno - node.lineno + 1 <= 45, f"{path.name}: {node.name}"


def requirements_of_conda() -> list[str]:
    conda = yaml.safe_load((ROOT / "conda.yaml").read_text())
    assert conda["dependencies"][:2] == ["python=3.11", "pip"]
    return conda["dependencies"][2]["pip"]


def test_conda_and_pyproject_agree_but_for_cuda() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    conda = requirements_of_conda()
    plain = [line for line in conda if not line.startswith("tensorflow")]
    assert plain == [d for d in project["dependencies"] if not d.startswith("tensorflow")]
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
    command = main.commands["run" if name == "main" else name]
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
    text = (ROOT / "README.md").read_text()
    return re.findall(rf"```{language}\n(.*?)\n```", text, re.DOTALL)


def test_readme_shows_the_variants_as_printed() -> None:
    assert describe_variants() in blocks("text")


def test_readme_names_only_options_that_exist() -> None:
    known = {opt for command in main.commands.values() for p in command.params for opt in p.opts}
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
