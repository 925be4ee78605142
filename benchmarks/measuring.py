"""What the benchmarks share: claims with bounds, fresh processes, the machine, the JSON file."""

import json
import os
import platform
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import click
import psutil

from har.data.manifest import Manifest
from har.data.prepare import load_manifest
from har.util.errors import UserError
from har.util.hardware import available_cpus
from har.util.progress import quiet_loading

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True, kw_only=True)
class Bar:
    """A claim: `measured` is at least (`at_least`), or at most, `bound`."""

    claim: str
    measured: float
    bound: float
    at_least: bool

    @property
    def met(self) -> bool:
        """Whether the claim holds."""
        return self.measured >= self.bound if self.at_least else self.measured <= self.bound


def load_images(data: str) -> Manifest:
    """What `har run --data` would train on.

    Raises:
        click.UsageError: it would refuse.
    """
    try:
        return load_manifest(data)
    except UserError as error:
        raise click.UsageError(str(error)) from error


def first_images(manifest: Manifest, count: int) -> Manifest:
    """The manifest cut down to `count` images, drawn so that the splits keep their shares."""
    if len(manifest.table) <= count:
        return manifest
    drawn = manifest.table.sample(count, random_state=0).sort_index().reset_index(drop=True)
    return replace(manifest, table=drawn)


def in_fresh_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """What `function` returns in a Python process started for this one call."""
    with ProcessPoolExecutor(max_workers=1, mp_context=get_context("spawn")) as pool:
        pool.submit(load_tensorflow).result()
        return pool.submit(function, *arguments).result()


def load_tensorflow() -> None:
    """Import it without its greetings."""
    with quiet_loading():
        import tensorflow  # noqa: F401


def find_machine() -> dict[str, Any]:
    """What the numbers were measured on."""
    from har.util.hardware import cpu_name

    return {
        "cpu": cpu_name(),
        "cores": available_cpus(),
        "memory_gb": round(psutil.virtual_memory().total / 1e9, 1),
        "load_average": os.getloadavg(),
        "system": platform.platform(),
        "python": platform.python_version(),
        **{name: version(name) for name in ("tensorflow", "keras", "mlflow", "pillow", "har")},
    }


def bar_lines(bars: list[Bar]) -> list[str]:
    """Each claim, measured and wanted."""
    lines = ["", f"{'bar':<48}{'measured':>10}{'wanted':>9}{'met':>5}"]
    for bar in bars:
        wanted = f"{'>=' if bar.at_least else '<='} {bar.bound:g}"
        met = "yes" if bar.met else "NO"
        lines.append(f"{bar.claim:<48}{bar.measured:>10.4f}{wanted:>9}{met:>5}")
    return lines


def finish(out: Path, found: dict[str, Any], bars: list[Bar]) -> None:
    """Write what was found; exit with 1 if a bar is missed."""
    out.parent.mkdir(parents=True, exist_ok=True)
    evaluated = [asdict(bar) | {"met": bar.met} for bar in bars]
    out.write_text(json.dumps(found | {"bars": evaluated}, indent=1) + "\n")
    click.echo(f"\nwritten: {out}")
    sys.exit(0 if all(bar.met for bar in bars) else 1)
