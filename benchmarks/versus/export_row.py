"""Export: from logits in the preprocessed grid to the written label map of a large volume with many classes."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import torch
from torch.nn import functional

from autossl.inference.model_folder import read_model
from autossl.interop.nnunet_export import NnunetExportRequest, export_nnunet

from .agreement import agreement
from .bench import DEFAULTS, OURS, Bench, Call, cores, worker_counts
from .random_model import CONFIGURATION, plans_3d, write_random_run

DATASET = "Dataset900_Large"
CASE = "large"
SHAPE_ZYX = (400, 512, 512)
CLASSES = 15
SPACING_ZYX_MM = (1.0, 0.8, 0.8)
PLANNED_SPACING_MM = 1.5
PATCH = 128
BLOB_MM = 20.0
"""Size of what the label map shows; noise would measure how well gzip packs noise."""
LEAST_EQUAL = 0.999
"""Share of voxels; nnU-Net rounds resampled logits to the half precision in which it gets them."""


@dataclass(frozen=True)
class ExportRow:
    """Both read the logits from one file in half precision, as nnU-Net's predictor gives them.

    nnU-Net gets them whole, as its export process does (which gets a second copy through a pipe besides). Ours gets
    rows of one patch at a time, as many as our predictor holds, in the float32 in which it gives them.
    """

    bench: Bench
    name: str
    planned_spacing_mm: tuple[float, float, float]
    shape_zyx: tuple[int, int, int] = SHAPE_ZYX
    n_classes: int = CLASSES
    target: dict[str, float] = field(default_factory=dict)
    time: str = "wall_s"

    @property
    def what(self) -> str:
        """A sentence."""
        z, y, x = self.shape_zyx
        logits = " x ".join(map(str, reversed(self.logits_shape)))
        return f"from logits ({logits}) to the written label map ({x} x {y} x {z}), {self.n_classes} classes"

    @property
    def folder(self) -> Path:
        """Everything of this row."""
        return self.bench.work / self.name

    @property
    def logits_shape(self) -> tuple[int, int, int]:
        """Of the preprocessed image, z,y,x."""
        ratio = np.divide(SPACING_ZYX_MM, self.planned_spacing_mm)
        z, y, x = (round(float(n)) for n in np.multiply(self.shape_zyx, ratio))
        return z, y, x

    def settings(self) -> dict[str, Any]:
        """Sizes."""
        return {
            "shape_zyx": list(self.shape_zyx),
            "classes": self.n_classes,
            "spacing_zyx_mm": list(SPACING_ZYX_MM),
            "planned_spacing_zyx_mm": list(self.planned_spacing_mm),
        }

    def prepare(self) -> None:
        """A model, the image whose geometry the result gets, and the logits."""
        shutil.rmtree(self.folder, ignore_errors=True)
        plans = plans_3d(DATASET, [PATCH] * 3, (8, 16, 32, 64, 128, 128), self.planned_spacing_mm, batch_size=2)
        labels = {"background": 0} | {f"class_{value}": value for value in range(1, self.n_classes)}
        run = write_random_run(self.folder / "run", plans, labels)
        export_nnunet(NnunetExportRequest(run, self.folder / "nnunet_results"))
        affine = np.diag([*reversed(SPACING_ZYX_MM), 1.0])
        image = np.zeros(self.shape_zyx[::-1], dtype=np.uint8)
        nibabel.save(nibabel.Nifti1Image(image, affine), self.folder / "image.nii.gz")  # type: ignore[no-untyped-call]
        spacing = np.multiply(SPACING_ZYX_MM, np.divide(self.shape_zyx, self.logits_shape))
        write_blobs(self.folder / "logits.npy", self.logits_shape, self.n_classes, spacing)

    def variants(self) -> dict[str, Call]:
        """nnU-Net: its defaults (8 threads for what PyTorch does there), and as many as cores."""
        counts = worker_counts(self.bench, (cores(),), default=8)
        theirs = {f"nnunet {count} threads": self._their_call(count) for count in counts}
        return {OURS: self.run_ours, DEFAULTS: self._their_call(None), **theirs}

    def run_ours(self) -> dict[str, float]:
        """`restore` of a stream of slabs, and what `autossl_predict` writes with."""
        model = read_model(self.folder / "run")
        task = {"model": str(model.folder), "rows": PATCH} | self._files("ours")
        return self.bench.in_autossl("export", task, self.folder).measured.to_json()

    def run_theirs(self, n_threads: int | None) -> dict[str, float]:
        """`export_prediction_from_logits`."""
        model = next((self.folder / "nnunet_results").glob("*/*__*__*"))
        task = {"model": str(model), "configuration": CONFIGURATION, "n_threads": n_threads} | self._files("theirs")
        return self.bench.in_nnunet("export", task, self.folder).measured.to_json()

    def same_work(self) -> dict[str, Any]:
        """The label maps."""
        folders = (self.folder / "out" / tool for tool in ("ours", "theirs"))
        found = agreement(*folders, ".nii.gz", list(range(1, self.n_classes)))
        return {"same": found["share_equal"] >= LEAST_EQUAL, **found}

    def _files(self, tool: str) -> dict[str, str]:
        out = self.folder / "out" / tool
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir(parents=True)
        files = {"logits": self.folder / "logits.npy", "image": self.folder / "image.nii.gz", "output": out / CASE}
        return {name: str(path) for name, path in files.items()}

    def _their_call(self, n_threads: int | None) -> Call:
        return lambda: self.run_theirs(n_threads)


def export_rows(bench: Bench, shape_zyx: tuple[int, int, int], n_classes: int) -> list[ExportRow]:
    """Resampled, which most plans ask for; and in the image's own grid, where there is nothing to resample."""
    fifth = {"time": 1 / 5, "memory": 1 / 5}
    planned = (PLANNED_SPACING_MM,) * 3
    return [
        ExportRow(bench, "export", planned, shape_zyx, n_classes, fifth),
        ExportRow(bench, "export_same_grid", SPACING_ZYX_MM, shape_zyx, n_classes),
    ]


def write_blobs(path: Path, shape: tuple[int, int, int], n_classes: int, spacing_mm: Any) -> None:
    """Smooth random logits [K,z,y,x] in half precision, class by class."""
    coarse = [max(2, round(n * mm / BLOB_MM)) for n, mm in zip(shape, spacing_mm, strict=True)]
    generator = torch.Generator().manual_seed(0)
    logits = np.lib.format.open_memmap(path, mode="w+", dtype=np.float16, shape=(n_classes, *shape))
    for index in range(n_classes):
        values = torch.randn((1, 1, *coarse), generator=generator) * 4 + (4 if index == 0 else 0)
        logits[index] = functional.interpolate(values, size=shape, mode="trilinear").numpy()[0, 0]
    logits.flush()
