"""The picture of a case shows the chosen slice and one outline per label value."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from autossl.evaluation.pictures import PicturedCase, draw_outlines


def colorful_share(path: Path) -> float:
    """Share of pixels that are not gray."""
    pixels = np.asarray(Image.open(path).convert("RGB")).astype(int)
    return float(((pixels.max(-1) - pixels.min(-1)) > 60).mean())


def pictured(label_map: np.ndarray) -> PicturedCase:
    image = np.random.default_rng(0).normal(size=label_map.shape)
    return PicturedCase("case_1", image, (2.0, 1.0, 1.0), {"reference": label_map}, {"reference": "organ 1.00"})


def test_outlines_appear_where_there_are_labels(tmp_path: Path) -> None:
    label_map = np.zeros((5, 20, 24), dtype=np.uint8)
    draw_outlines(tmp_path / "empty.png", [pictured(label_map)])
    label_map[3, 5:15, 5:15] = 1
    label_map[3, 8:12, 8:12] = 2
    draw_outlines(tmp_path / "outlines.png", [pictured(label_map), pictured(label_map)])
    assert colorful_share(tmp_path / "empty.png") == 0
    assert colorful_share(tmp_path / "outlines.png") > 0.003
    wide, double = (Image.open(tmp_path / name).size for name in ("empty.png", "outlines.png"))
    assert double[1] == 2 * wide[1]
