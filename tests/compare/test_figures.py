"""Figures that compare trainings."""

from dataclasses import replace
from pathlib import Path

from har.compare.figures import draw_waterfall
from tests.compare.test_ablation import AFTER, BEFORE, effect


def test_waterfall_is_drawn_whatever_is_known(tmp_path: Path) -> None:
    unknown = replace(effect(), before=None, after=None)
    for number, effects in enumerate(([], [unknown], [effect(), unknown, effect(AFTER, BEFORE)])):
        draw_waterfall(effects).savefig(tmp_path / f"{number}.png")
