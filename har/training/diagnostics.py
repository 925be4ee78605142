"""Facts about the data and the devices that a variant prints before it trains."""

from collections.abc import Callable

from har.data.manifest import Manifest
from har.models.devices import Hardware
from har.util.escaping import for_terminal


def explore(manifest: Manifest, hardware: Hardware) -> str:
    """Describe what v1's exploratory cells print: labels, one-hot length, label map, GPUs."""
    names = manifest.class_names
    lines = [
        f"labels: {len(names)}",
        f"length of a one-hot row: {len(names)}",
        "label map: " + ", ".join(f"{name}={i}" for i, name in enumerate(names)),
        f"GPUs: {', '.join(hardware.gpu_names) or 'none'}",
    ]
    return "\n".join(map(for_terminal, lines))


DIAGNOSTICS: dict[str, Callable[[Manifest, Hardware], str]] = {
    "none": lambda manifest, hardware: "",
    "explore": explore,
}
