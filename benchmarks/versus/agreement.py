"""How far two folders of label maps agree; compared as files, so that their grids are compared as well."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from autossl.data.image_io import read_label


def agreement(ours: Path, theirs: Path, ending: str, labels: list[int]) -> dict[str, Any]:
    """Of two folders of label maps, which must hold the same cases on the same grids.

    Args:
        ours: one folder.
        theirs: the other.
        ending: of the files.
        labels: foreground label values.
    """
    names = sorted(path.name for path in theirs.glob(f"*{ending}"))
    if not names or names != sorted(path.name for path in ours.glob(f"*{ending}")):
        raise SystemExit(f"{ours} and {theirs} hold other cases, or none")
    equal = total = foreground = 0
    worst, dice = 1.0, []
    for name in names:
        one, spacing, geometry = read_label(ours / name)
        two, other_spacing, other_geometry = read_label(theirs / name)
        if one.shape != two.shape or not np.allclose(spacing, other_spacing, rtol=1e-5):
            raise SystemExit(f"{name}: another grid")
        if not np.allclose(geometry.origin_xyz, other_geometry.origin_xyz, atol=1e-3):
            raise SystemExit(f"{name}: another place")
        same = int((one == two).sum())
        equal, total, worst = equal + same, total + one.size, min(worst, same / one.size)
        foreground += int((two > 0).sum())
        dice += [dice_between(one == label, two == label) for label in labels]
    return {
        "cases": len(names),
        "voxels": total,
        "voxels_that_differ": total - equal,
        "share_equal": equal / total,
        "share_equal_worst_case": worst,
        "share_foreground": foreground / total,
        "mean_dice": float(np.mean(dice)),
        "worst_dice": min(dice),
    }


def dice_between(one: np.ndarray, two: np.ndarray) -> float:
    """1 where both are empty."""
    both = int(one.sum()) + int(two.sum())
    return 1.0 if both == 0 else 2 * int((one & two).sum()) / both
