"""The real nnU-Net v2 predicts with exported runs what autossl predicts.

Skipped unless AUTOSSL_NNUNET_ENV names a virtual environment with nnunetv2 2.8.1.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from tiny_model import tiny_plans, write_tiny_run
from torch import Tensor, nn
from torch.nn import functional

from autossl.data.files import read_json, write_json
from autossl.data.image_io import read_label
from autossl.inference.checkpoint import FORMAT
from autossl.inference.model_folder import read_model
from autossl.inference.predict import predict
from autossl.inference.request import PredictRequest
from autossl.interop.nnunet_export import NnunetExportRequest, export_nnunet
from autossl.networks.build import build_network, residual_twin
from autossl.networks.prediction import Member, PredictionSpec
from toys import toy_architecture

ENVIRONMENT = os.environ.get("AUTOSSL_NNUNET_ENV")
pytestmark = pytest.mark.skipif(not ENVIRONMENT, reason="AUTOSSL_NNUNET_ENV names no environment with nnU-Net")
LEAST = 0.999
"""Share of equal voxels, and Dice between the two."""
IN_ONE_PROCESS = """
import json, sys, torch
from pathlib import Path
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
for model, folds, images, output in json.load(open(sys.argv[1])):
    predictor = nnUNetPredictor(device=torch.device("cpu"), perform_everything_on_device=False, allow_tqdm=False)
    predictor.initialize_from_trained_model_folder(model, folds, "checkpoint_final.pth")
    Path(output).mkdir(parents=True)
    predictor.predict_from_files_sequential(images, output)
"""
"""Importing nnU-Net takes longer than predicting our small images."""


@dataclass(frozen=True)
class Kind:
    """A run, and the images it predicts."""

    name: str
    dims: int = 3
    ending: str = ".nii.gz"
    channels: tuple[int, ...] | None = None
    regions: bool = False
    residual: bool = False
    mirror_axes: tuple[int, ...] = (0,)
    folds: tuple[str, ...] = ("0",)
    spacing: tuple[float, ...] = (1.4, 1.0, 0.9)


KINDS = (
    Kind("3d", folds=("0", "1")),
    Kind("2d", dims=2, mirror_axes=(0, 1)),
    Kind("mha", ending=".mha"),
    Kind("channels", channels=(1,), mirror_axes=()),
    Kind("regions", regions=True),
    Kind("residual", residual=True, mirror_axes=(1, 2)),
)


def test_label_maps_of_nnunet_are_ours(tmp_path: Path) -> None:
    jobs = []
    for kind in KINDS:
        root = tmp_path / kind.name
        run = trained_run(root / "run", kind)
        images = write_images(root / "images", kind)
        result = export_nnunet(NnunetExportRequest(run, root / "results"))
        predict(PredictRequest(images, root / "ours", model=run, device="cpu"))
        jobs.append([str(result.folder), result.folds, str(images), str(root / "theirs")])
    (tmp_path / "jobs.json").write_text(json.dumps(jobs))
    call("python", ["-c", IN_ONE_PROCESS, str(tmp_path / "jobs.json")], tmp_path)
    for kind in KINDS:
        share, dice = agreement(tmp_path / kind.name, kind.ending)
        assert share >= LEAST, f"{kind.name}: {share} of the voxels are equal"
        assert dice >= LEAST, f"{kind.name}: Dice {dice}"


def test_the_installed_archive_predicts_by_the_command(tmp_path: Path) -> None:
    kind = Kind("3d", folds=("0", "1"))
    run, images = trained_run(tmp_path / "run", kind), write_images(tmp_path / "images", kind)
    result = export_nnunet(NnunetExportRequest(run, tmp_path / "exported", archive=True))
    (tmp_path / "results").mkdir()
    call("nnUNetv2_install_pretrained_model_from_zip", [str(result.archive)], tmp_path)
    places = ["-i", str(images), "-o", str(tmp_path / "theirs"), "-device", "cpu", "-npp", "1", "-nps", "1"]
    call("nnUNetv2_predict", [*places, *result.predict_arguments], tmp_path)
    predict(PredictRequest(images, tmp_path / "ours", model=run, device="cpu"))
    share, dice = agreement(tmp_path, kind.ending)
    assert share >= LEAST
    assert dice >= LEAST


def call(program: str, arguments: Sequence[str], root: Path) -> None:
    """A program of the environment."""
    environment = os.environ | {f"nnUNet_{name}": str(root / name) for name in ("raw", "preprocessed", "results")}
    command = [str(Path(ENVIRONMENT or "") / "bin" / program), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, cwd=root)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]


def trained_run(folder: Path, kind: Kind) -> Path:
    """Networks that know bright from dark: with random weights many voxels would be near ties."""
    n_channels = 1 if kind.channels is None else 2
    plain = toy_architecture(kind.dims, (4, 8))
    architecture = residual_twin(plain) if kind.residual else plain
    plans = tiny_plans(
        n_channels,
        kind.dims,
        architecture=architecture,
        mirror_axes=kind.mirror_axes,
        spacing=kind.spacing[-kind.dims :],
    )
    write_tiny_run(folder, kind.folds, plans, kind.ending)
    labels: dict[str, Any] = {"background": 0, "organ": 1, "tumor": 2}
    more: dict[str, Any] = {"labels": labels}
    if kind.regions:
        more = {"labels": {"background": 0, "whole": [1, 2], "core": 2}, "regions_class_order": [1, 2]}
    write_json(folder / "dataset.json", read_json(folder / "dataset.json") | more)
    model = read_model(folder)
    member = Member(name="network", architecture=architecture, channels=kind.channels)
    spec = PredictionSpec(members=(member,), activation="sigmoid" if kind.regions else "softmax")
    for seed, fold in enumerate(kind.folds):
        n_seen = n_channels if kind.channels is None else len(kind.channels)
        network = build_network(architecture, n_seen, model.schema.n_outputs, deep_supervision=False, seed=seed)
        teach(network, kind.dims, n_seen, kind.regions)
        content = {"format": FORMAT, "networks": {"network": network.state_dict()}, "prediction": spec.to_json()}
        torch.save(content, model.checkpoint(fold))
    return folder


def teach(network: nn.Module, dims: int, n_channels: int, regions: bool) -> None:
    """Two thresholds of the smoothed image, in a few steps."""
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adam(network.parameters(), 0.02)
    for _ in range(150):
        image = smooth(torch.randn((4, n_channels, *(8,) * dims), generator=generator))
        levels = torch.stack([image[:, 0] > 0.3, image[:, 0] > 1.2], 1)
        logits = network(image)
        loss = (
            functional.binary_cross_entropy_with_logits(logits, levels.float())
            if regions
            else functional.cross_entropy(logits, levels.sum(1))
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def smooth(image: Tensor) -> Tensor:
    """Neighbors alike, mean 0 and standard deviation 1."""
    pool = functional.avg_pool3d if image.ndim == 5 else functional.avg_pool2d
    blurred = pool(image, 3, 1, 1)
    return (blurred - blurred.mean()) / blurred.std()


def write_images(folder: Path, kind: Kind) -> Path:
    """Two cases on a rotated grid, of other spacings than the plan."""
    folder.mkdir(parents=True)
    for number in range(2):
        for channel in range(1 if kind.channels is None else 2):
            generator = torch.Generator().manual_seed(10 * number + channel)
            volume = smooth(smooth(torch.randn((1, 1, 12, 18, 21 + number), generator=generator)))[0, 0]
            image = sitk.GetImageFromArray((100 + 20 * volume).numpy().astype(np.float32))
            image.SetSpacing((0.8, 1.0, 1.5))
            image.SetOrigin((-12.5, 30.0, 4.0))
            image.SetDirection((0, -1, 0, 1, 0, 0, 0, 0, 1))
            sitk.WriteImage(image, str(folder / f"case{number}_{channel:04d}{kind.ending}"))
    return folder


def agreement(root: Path, ending: str) -> tuple[float, float]:
    """Share of equal voxels, and mean Dice over cases and labels; grids must be the same, and there is foreground."""
    shares, dice = [], []
    names = sorted(path.name for path in (root / "theirs").glob(f"*{ending}"))
    assert names == [f"case{number}{ending}" for number in range(2)]
    for name in names:
        ours, spacing, geometry = read_label(root / "ours" / name)
        theirs, other_spacing, other_geometry = read_label(root / "theirs" / name)
        assert np.allclose(spacing, other_spacing, rtol=1e-5)
        assert np.allclose(geometry.origin_xyz, other_geometry.origin_xyz, atol=1e-3)
        assert {0, 1, 2} <= set(np.unique(theirs)), "else a label is not compared"
        shares.append(float((ours == theirs).mean()))
        for label in (1, 2):
            a, b = ours == label, theirs == label
            both = float(a.sum() + b.sum())
            dice.append(2 * float((a & b).sum()) / both if both else 1.0)
    return float(np.mean(shares)), float(np.mean(dice))
