"""Compares label maps of the real nnUNetv2_predict with those of autossl_predict, for models that went either way.

    python benchmarks/nnunet_exchange.py --nnunet_env ENV -o FILE.json [--cases 26] [--no_mirroring] [--folds 0 1 …]
        [--export RUN_FOLDER[@MEMBER] IMAGES]… [--import NNUNET_MODEL IMAGES]…

ENV is a virtual environment with nnunetv2 2.8.1 (its bin/ holds nnUNetv2_predict). Of an exported run that predicts
with two networks, MEMBER is the one that goes alone; here it predicts alone too. NNUNET_MODEL is a folder
TRAINER__PLANS__CONFIGURATION. IMAGES are the first cases of a folder as imagesTr.

Every row is written as soon as it is measured, and those that are in FILE already are not measured again. The target:
at least 99.9 % equal voxels, and a mean Dice between the two of at least 0.999 (mean over cases and foreground labels;
a label that is in neither map counts 1). Maps without any foreground tell nothing, so they reach nothing.
Label maps are compared as files, so that their grids are compared as well.
"""

from __future__ import annotations

import argparse
import os
import platform
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from versus.agreement import agreement

from autossl.data.case_files import case_files
from autossl.data.description import read_description
from autossl.data.files import read_json, write_json
from autossl.data.provenance import Written
from autossl.inference.model_folder import read_model
from autossl.interop.nnunet_export import NnunetExportRequest, export_nnunet
from autossl.interop.nnunet_weights import single_network, single_network_checkpoint

TARGET = {"share_equal": 0.999, "mean_dice": 0.999}
PREDICT_FROM_FOLDER = "nnUNetv2_predict_from_modelfolder"


@dataclass(frozen=True)
class Row:
    """One model and the images to compare it on."""

    direction: str
    """export or import."""
    model: Path
    member: str | None
    images: Path
    cases: int
    mirroring: bool
    folds: tuple[str, ...]
    """Empty: all that are finished."""

    @property
    def key(self) -> dict[str, Any]:
        """What tells rows apart, without the places of this machine."""
        return {
            "direction": self.direction,
            "model": "/".join(self.model.resolve().parts[-3:]),
            "member": self.member,
            "cases": self.cases,
            "mirroring": self.mirroring,
            "folds": list(self.folds),
        }


@dataclass(frozen=True)
class Tools:
    """How to call both programs."""

    nnunet: Path
    """The environment."""
    work: Path
    """An empty folder."""

    def timed(self, command: list[str]) -> float:
        """Wall seconds of a command that must succeed."""
        environment = os.environ | {f"nnUNet_{name}": str(self.work) for name in ("raw", "preprocessed", "results")}
        start = time.perf_counter()
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, cwd=self.work)
        if done.returncode:
            raise SystemExit(f"{' '.join(command)} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
        return time.perf_counter() - start

    def theirs(self, row: Row, model: Path, folds: tuple[str, ...]) -> float:
        """Predicts into work/theirs."""
        command = [str(self.nnunet / "bin" / PREDICT_FROM_FOLDER), "-m", str(model), "-f", *folds, "-device", "cpu"]
        command += ["-i", str(self.work / "images"), "-o", str(self.work / "theirs"), "--disable_progress_bar"]
        return self.timed([*command, "-npp", "1", "-nps", "1", *([] if row.mirroring else ["--disable_tta"])])

    def ours(self, row: Row, model: Path, folds: tuple[str, ...]) -> float:
        """Predicts into work/ours."""
        command = [str(Path(sys.executable).with_name("autossl_predict")), "-q", "--model", str(model), "-f", *folds]
        command += ["-i", str(self.work / "images"), "-o", str(self.work / "ours"), "--device", "cpu"]
        return self.timed([*command, *([] if row.mirroring else ["--no_mirroring"])])


def measure(row: Row, nnunet: Path) -> dict[str, Any]:
    """One row of the table."""
    with tempfile.TemporaryDirectory() as name:
        tools = Tools(nnunet, Path(name))
        made = _exported(row, tools) if row.direction == "export" else _imported(row, tools)
        ours, theirs = made
        model = read_model(ours, row.folds or None)
        ending = model.description.file_ending
        _link_images(row, tools.work / "images", ending, model.plan.n_channels)
        seconds = {"nnunet": tools.theirs(row, theirs, model.folds), "autossl": tools.ours(row, ours, model.folds)}
        labels = sorted({value for values in model.schema.foreground.values() for value in values})
        found = agreement(tools.work / "ours", tools.work / "theirs", ending, labels)
    reached = found["share_foreground"] > 0 and all(found[key] >= least for key, least in TARGET.items())
    facts = {"dataset": model.run.dataset, "configuration": model.run.configuration, "method": model.run.method}
    wall = {f"{tool}_wall_s": round(value, 1) for tool, value in seconds.items()}
    return row.key | facts | {"folds_used": list(model.folds)} | found | {"reached": reached} | wall


def _exported(row: Row, tools: Tools) -> tuple[Path, Path]:
    """A run of ours, and the folder of nnU-Net that it became."""
    request = NnunetExportRequest(row.model, tools.work / "results", folds=row.folds or None, member=row.member)
    result = export_nnunet(request)
    if row.member is None:
        return row.model, result.folder
    model = read_model(row.model, row.folds or None)
    alone = tools.work / "alone"
    alone.mkdir()
    for name in ("run.json", "plans.json", "dataset.json"):
        (alone / name).symlink_to((row.model / name).resolve())
    for fold in model.folds:
        path = model.checkpoint(fold)
        (alone / path.parent.name).mkdir()
        content = single_network_checkpoint(path, single_network(path, model.plan, row.member))
        torch.save(content, alone / path.parent.name / path.name)
    return alone, result.folder


def _imported(row: Row, tools: Tools) -> tuple[Path, Path]:
    """A run of ours that a model of nnU-Net became, and that model."""
    dataset = row.model.resolve().parent.name
    command = [str(Path(sys.executable).with_name("autossl_import_nnunet")), "-q", str(row.model.resolve())]
    tools.timed([*command, "-d", dataset, "--workspace", str(tools.work / "workspace")])
    (run,) = (tools.work / "workspace" / "results" / dataset).glob("*/*/run.json")
    return run.parent, row.model.resolve()


def _link_images(row: Row, target: Path, ending: str, n_channels: int) -> None:
    """The first cases by name, with the channel's number in each name, as nnU-Net wants it."""
    target.mkdir()
    for case, files in list(case_files(row.images, ending, n_channels).items())[: row.cases]:
        for channel, path in enumerate(files):
            (target / f"{case}_{channel:04d}{ending}").symlink_to(path.resolve())


def _rows(arguments: argparse.Namespace) -> list[Row]:
    shared = (arguments.cases, not arguments.no_mirroring, tuple(arguments.folds or ()))
    rows = []
    for model, images in arguments.export:
        folder, _, member = model.partition("@")
        rows.append(Row("export", Path(folder), member or None, Path(images), *shared))
    for model, images in arguments.imported:
        read_description(Path(model))
        rows.append(Row("import", Path(model), None, Path(images), *shared))
    return rows


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nnunet_env", type=Path, required=True, metavar="ENV")
    parser.add_argument("--export", nargs=2, action="append", default=[], metavar=("RUN[@MEMBER]", "IMAGES"))
    parser.add_argument(
        "--import", dest="imported", nargs=2, action="append", default=[], metavar=("NNUNET_MODEL", "IMAGES")
    )
    parser.add_argument("--cases", type=int, default=26)
    parser.add_argument("--folds", nargs="+", metavar="FOLD", help="default: all finished ones")
    parser.add_argument("--no_mirroring", action="store_true")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="FILE")
    arguments = parser.parse_args()
    content = read_json(arguments.output) if arguments.output.is_file() else {"target": TARGET, "rows": []}
    for row in _rows(arguments):
        if any(row.key.items() <= known.items() for known in content["rows"]):
            print(f"{row.key['model']}: measured before")
            continue
        found = measure(row, arguments.nnunet_env)
        content["rows"].append(found | {"written": Written.now().model_dump(mode="json")})
        content["machine"] = {"cpus": os.cpu_count(), "processor": platform.processor() or platform.machine()}
        content["versions"] = {"nnunetv2": _nnunet_version(arguments.nnunet_env), "torch": version("torch")}
        write_json(arguments.output, content)
        print(
            f"{row.direction} {found['dataset']} {found['configuration']} {found['method']}"
            f"{' ' + row.member if row.member else ''}: {found['share_equal']:.4%} equal, "
            f"Dice {found['mean_dice']:.5f}, {'reached' if found['reached'] else 'NOT reached'}",
            flush=True,
        )


def _nnunet_version(environment: Path) -> str:
    code = "from importlib.metadata import version; print(version('nnunetv2'))"
    done = subprocess.run([environment / "bin" / "python", "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.strip()


if __name__ == "__main__":
    main()
