"""prediction.json: what predicted the label maps of a folder, and whether a prediction may go on in it."""

from __future__ import annotations

import platform
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from autossl.data.files import read_json
from autossl.data.problems import InvalidInput, Problem
from autossl.inference.backends import Backend, backend_version, choose_backend
from autossl.inference.choice import ChosenModel
from autossl.inference.outputs import OutputFolder
from autossl.inference.request import PredictRequest
from autossl.version import __version__

RECORD_FILE = "prediction.json"


def record_of(request: PredictRequest, chosen: ChosenModel, channels: tuple[int, ...] | None) -> dict[str, Any]:
    """What is written to prediction.json, but for what computes the networks.

    Args:
        request: What was asked for.
        chosen: The model that it names.
        channels: Numbers of those that it predicts from; None: all.
    """
    first = chosen.model.first
    return {
        "inference_plan": None if chosen.plan is None else str(chosen.plan.resolve()),
        "members": [
            {
                "model": str(member.folder.resolve()),
                "folds": list(member.folds),
                "split": member.run.split,
                "configuration": member.run.configuration,
                "preset": member.run.preset,
                "method": member.run.method,
                "tag": member.run.tag,
                "seed": member.run.seed,
                "total_steps": member.run.total_steps,
                "mirror_axes": list(member.plan.mirror_axes) if request.mirroring else [],
            }
            for member in chosen.model.members
        ],
        "modality": None if channels is None else first.description.channels.name_of(channels),
        "mirroring": request.mirroring,
        "step_size": request.step_size,
        "postprocessing": [rule.model_dump(mode="json") for rule in chosen.rules],
        "input_folder": str(Path(request.input).resolve()),
        "dataset": first.run.dataset,
        "versions": {"autossl": __version__, "torch": torch.__version__, "python": platform.python_version()},
    }


def asked_backend(request: PredictRequest, device: str) -> str:
    """What to load the networks for; a folder that goes on keeps what computed its other cases.

    Raises:
        InvalidInput: this machine cannot compute so.
    """
    path, asked = Path(request.output) / RECORD_FILE, request.backend
    if asked == "auto" and request.resume and path.is_file():
        asked = _identity_in(path)["backend"]
    choose_backend(asked, device)
    return asked


def add_backend(record: dict[str, Any], backend: Backend, device: str) -> str:
    """Puts into the record what came of the request's backend; gives its name, version and device."""
    version = backend_version(backend)
    record["backend"] = backend
    record["versions"] = {**record["versions"], backend: version}
    return f"{backend} {version} on {device}"


def finished_cases(
    request: PredictRequest, outputs: OutputFolder, cases: Iterable[str], record: Mapping[str, Any]
) -> list[str]:
    """Cases to skip, because their results are complete and of the same model.

    Raises:
        InvalidInput: results are there that the request does not allow for, or that something else predicted.
    """
    there = [case for case in cases if outputs.label_map(case).exists()]
    if not there or request.overwrite:
        return []
    if not request.resume:
        shown = ", ".join(there[:5]) + (f" and {len(there) - 5} more" if len(there) > 5 else "")
        raise InvalidInput(
            Problem(
                f"results of {len(there)} cases are there: {shown}",
                "an output folder without results of these cases",
                "continue with --resume, replace them with --overwrite, or choose another folder",
                file=outputs.folder,
            )
        )
    path = outputs.folder / RECORD_FILE
    if not path.is_file():
        raise InvalidInput(
            Problem(
                f"results of {len(there)} cases, and nothing that says what predicted them",
                f"{RECORD_FILE} beside them",
                "replace them with --overwrite, or choose another folder",
                file=outputs.folder,
            )
        )
    now, before = _identity(record), _identity_in(path)
    differing = [name for name in now if before[name] != now[name]]
    if differing:
        raise InvalidInput(
            [
                Problem(
                    f"{name} was {before[name]!r}, now it is {now[name]!r}",
                    "the same for all cases of a folder",
                    "repeat the options of before, replace all with --overwrite, or choose another folder",
                    file=path,
                )
                for name in differing
            ]
        )
    return [case for case in there if outputs.is_complete(case)]


def _identity_in(path: Path) -> dict[str, Any]:
    try:
        return _identity(read_json(path))
    except (KeyError, TypeError, AttributeError) as error:
        found, expected = "a record that says nothing of what predicted", f"{RECORD_FILE} as autossl_predict writes it"
        fix = "replace the results with --overwrite, or choose another folder"
        raise InvalidInput(Problem(found, expected, fix, file=path)) from error


def _identity(record: Mapping[str, Any]) -> dict[str, Any]:
    """What must agree for `resume`; records of one run once held it without a list of members."""
    return {
        "runs": [f"{run['model']}, fold {', '.join(run['folds'])}" for run in record.get("members", [record])],
        "modality": record.get("modality"),
        "mirroring": record["mirroring"],
        "step_size": record["step_size"],
        "postprocessing": record.get("postprocessing", []),
        "backend": record.get("backend", "torch"),
    }
