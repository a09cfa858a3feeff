"""Prediction: the whole command, from images to label maps, same network and weights."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from autossl.data.case_files import case_files
from autossl.inference.model_folder import read_model
from autossl.interop.nnunet_export import NnunetExportRequest, export_nnunet

from .agreement import agreement
from .bench import DEFAULTS, OURS, Bench, Call, copy_images, cores, worker_counts
from .random_model import plans_3d, write_random_run

DATASET = "Dataset004_Hippocampus"
LABELS = {"background": 0, "Anterior": 1, "Posterior": 2}
CASES = 26
LEAST_EQUAL = 0.999
"""Share of voxels. nnU-Net sums logits in half precision, which decides near ties: many with random weights, few with
trained ones. Its own predictor with float32 sums tells how much of the difference that is."""


@dataclass(frozen=True)
class PredictRow:
    """nnU-Net's own 3d_fullres plan for hippocampus with random weights, or a trained run; one fold."""

    bench: Bench
    mirroring: bool
    trained: Path | None = None
    """A run of ours that predicts with one network, its images those of its dataset; None: random weights."""
    target: dict[str, float] = field(default_factory=lambda: {"time": 1 / 3})
    time: str = "wall_s"

    @property
    def name(self) -> str:
        """`predict` or `predict_mirrored`."""
        return "predict_mirrored" if self.mirroring else "predict"

    @property
    def what(self) -> str:
        """A sentence."""
        return f"predict {self._n_cases} cases, one fold, {'with' if self.mirroring else 'without'} mirroring"

    @property
    def folder(self) -> Path:
        """Everything of this row."""
        return self.bench.work / self.name

    @property
    def model(self) -> Path:
        """The run that predicts."""
        return self.trained or self.folder / "run"

    def settings(self) -> dict[str, Any]:
        """Model and images."""
        weights = "random" if self.trained is None else "/".join(self.trained.resolve().parts[-3:])
        return {"weights": weights, "mirroring": self.mirroring, "cases": self._n_cases, "device": self.bench.device}

    def prepare(self) -> None:
        """The run, the same as a model of nnU-Net, and the images."""
        shutil.rmtree(self.folder, ignore_errors=True)
        if self.trained is None:
            plans = plans_3d(DATASET, (40, 56, 40), (32, 64, 128, 256), (1.0, 1.0, 1.0), batch_size=9)
            write_random_run(self.folder / "run", plans, LABELS)
        model = read_model(self.model)
        export_nnunet(NnunetExportRequest(self.model, self.folder / "nnunet_results", folds=model.folds[:1]))
        images, ending = self.folder / "images", model.description.file_ending
        images.mkdir()
        source = self.bench.data / model.run.dataset / "imagesTr"
        for case, files in list(case_files(source, ending, model.plan.n_channels).items())[: self._n_cases]:
            copy_images(images, case, files, ending)

    def variants(self) -> dict[str, Call]:
        """nnU-Net: its defaults (3 processes to read, 3 to write), none, one, and as many as cores."""
        counts = worker_counts(self.bench, (0, 1, cores()), default=3)
        theirs = {f"nnunet {count} workers": self._their_call(count) for count in counts}
        return {OURS: self.run_ours, DEFAULTS: self._their_call(None), **theirs}

    def run_ours(self) -> dict[str, float]:
        """Into out/ours."""
        out = self._emptied("ours")
        command = [self.bench.ours("autossl_predict"), "-q", "-i", str(self.folder / "images"), "-o", str(out)]
        command += ["--model", str(self.model), "-f", self._fold, "--device", self.bench.device]
        return self.bench.run([*command, *([] if self.mirroring else ["--no_mirroring"])], self.folder).to_json()

    def run_theirs(self, workers: int | None) -> dict[str, float]:
        """Into out/theirs."""
        out, folder = self._emptied("theirs"), self._their_model
        trainer, plans, configuration = folder.name.split("__")
        command = [self.bench.theirs("nnUNetv2_predict"), "-i", str(self.folder / "images"), "-o", str(out)]
        command += ["-d", folder.parent.name, "-c", configuration, "-tr", trainer, "-p", plans, "-f", self._fold]
        command += ["-device", self.bench.device, "--disable_progress_bar"]
        command += [] if workers is None else ["-npp", str(workers), "-nps", str(workers)]
        return self.bench.run([*command, *([] if self.mirroring else ["--disable_tta"])], self.folder).to_json()

    def same_work(self) -> dict[str, Any]:
        """The label maps of both, and of nnU-Net's predictor with sums in float32."""
        model = read_model(self.model)
        ending = model.description.file_ending
        labels = sorted({value for values in model.schema.foreground.values() for value in values})
        as_it_is = agreement(self.folder / "out" / "ours", self.folder / "out" / "theirs", ending, labels)
        task = {
            "images": str(self.folder / "images"),
            "output": str(self._emptied("float32")),
            "model": str(self._their_model),
            "fold": self._fold,
            "mirroring": self.mirroring,
        }
        self.bench.in_nnunet("predict_in_float32", task, self.folder)
        exact = agreement(self.folder / "out" / "ours", self.folder / "out" / "float32", ending, labels)
        return {
            "same": as_it_is["share_equal"] >= LEAST_EQUAL,
            "as_it_is": as_it_is,
            "nnunet_in_float32": exact,
        }

    @property
    def _n_cases(self) -> int:
        return self.bench.cases or CASES

    @property
    def _fold(self) -> str:
        return read_model(self.model).folds[0]

    @property
    def _their_model(self) -> Path:
        return next((self.folder / "nnunet_results").glob("*/*__*__*"))

    def _their_call(self, workers: int | None) -> Call:
        return lambda: self.run_theirs(workers)

    def _emptied(self, name: str) -> Path:
        folder = self.folder / "out" / name
        shutil.rmtree(folder, ignore_errors=True)
        folder.parent.mkdir(exist_ok=True)
        return folder


def predict_rows(bench: Bench, trained: Path | None) -> list[PredictRow]:
    """Without and with mirroring."""
    return [PredictRow(bench, mirroring, trained) for mirroring in (False, True)]
