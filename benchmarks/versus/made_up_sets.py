"""Made-up datasets on which preprocessing has to do what the real ones here do not ask for."""

from __future__ import annotations

from pathlib import Path

import nibabel
import numpy as np
from scipy.ndimage import gaussian_filter

from autossl.data.files import write_json


def make_ct(folder: Path, cases: int = 8) -> None:
    """Bodies of soft tissue in air at -1024 HU, table air cut off, organs with nested labels; spacings vary."""
    labels = {"background": 0, "liver": 1, "tumor": 2, "kidney": 3, "spleen": 4, "bone": 5}
    _describe(folder, {"0": "CT"}, labels, cases)
    for case in range(cases):
        rng = np.random.default_rng([1, case])
        shape = tuple(int(n) for n in rng.integers((22, 90, 90), (40, 130, 130)))
        spacing_zyx = (float(rng.choice([3.0, 5.0, 7.5])), *([float(rng.uniform(0.6, 1.4))] * 2))
        field = gaussian_filter(rng.normal(size=shape), (1.2, 6, 6))
        field /= field.std()
        label = np.digitize(field, [0.6, 1.0, 1.5, 1.9, 2.4]).astype(np.uint8)
        radius = np.linspace(-1, 1, shape[1])[:, None] ** 2 + np.linspace(-1, 1, shape[2]) ** 2
        body = np.broadcast_to(radius < 0.8, shape)
        label[~body] = 0
        hounsfield = np.where(body, 40 + 25 * label + rng.normal(0, 18, shape), -1024)
        hounsfield[:, :3] = 0  # padding by the reconstruction, to be cropped
        _write_case(folder, f"ct_{case:03d}", [hounsfield.astype(np.int16)], label, spacing_zyx)


def make_masked_mr(folder: Path, cases: int = 6) -> None:
    """Two channels, zero outside a ball that fills a part of the volume, coarse axis stored as x; ventricles are 0."""
    _describe(folder, {"0": "T1", "1": "FLAIR"}, {"background": 0, "edema": 1, "core": 2}, cases)
    for case in range(cases):
        rng = np.random.default_rng([2, case])
        shape = tuple(int(n) for n in rng.integers((70, 80, 16), (90, 100, 24)))
        spacing_zyx = (float(rng.uniform(0.8, 1.2)), 1.0, float(rng.choice([3.9, 4.5, 5.0])))
        grid = np.meshgrid(*(np.linspace(-1, 1, n) for n in shape), indexing="ij")
        brain = sum(axis**2 for axis in grid) < 0.75
        field = gaussian_filter(rng.normal(size=shape), (4, 4, 1))
        field /= field.std()
        hole = (np.abs(grid[0]) < 0.12) & (np.abs(grid[1]) < 0.2) & (np.abs(grid[2]) < 0.3)
        label = np.where(brain & ~hole, np.digitize(field, [1.0, 1.7]), 0).astype(np.uint8)
        channels = [
            np.where(brain & ~hole, 200.0 * (c + 1) + 30.0 * label + rng.normal(0, 20, shape), 0).astype(np.float32)
            for c in range(2)
        ]
        _write_case(folder, f"mr_{case:03d}", channels, label, spacing_zyx)


def _describe(folder: Path, channels: dict[str, str], labels: dict[str, int], cases: int) -> None:
    content = {"channel_names": channels, "labels": labels, "numTraining": cases, "file_ending": ".nii.gz"}
    write_json(folder / "dataset.json", content)


def _write_case(
    folder: Path, case: str, channels: list[np.ndarray], label: np.ndarray, spacing_zyx: tuple[float, ...]
) -> None:
    affine = np.diag([*spacing_zyx[::-1], 1.0])
    files = {f"imagesTr/{case}_{i:04d}": channel for i, channel in enumerate(channels)}
    for name, array in (files | {f"labelsTr/{case}": label}).items():
        path = folder / f"{name}.nii.gz"
        path.parent.mkdir(parents=True, exist_ok=True)
        nibabel.save(nibabel.Nifti1Image(array.transpose(2, 1, 0), affine), path)  # type: ignore[no-untyped-call]
