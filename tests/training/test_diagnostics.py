"""What v1 prints before it trains."""

from har.data.manifest import Manifest
from har.training.diagnostics import DIAGNOSTICS


def test_exploration_prints_what_v1_prints(manifest: Manifest) -> None:
    from har.models.devices import find_hardware

    text = DIAGNOSTICS["explore"](manifest, find_hardware())
    assert (
        "labels: 3" in text and "sitting=0, running=1, texting=2" in text and "GPUs: none" in text
    )
    assert DIAGNOSTICS["none"](manifest, find_hardware()) == ""
