"""Weights to start from: what matched by name and shape, and that they have seen no case the fold validates on.

A file starts every fold. A run's folder starts each fold from its own fold of that run: since cases never move between
folds, these weights have not seen the labels of the cases that the fold validates on.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from autossl.data.files import content_hash, file_hash
from autossl.data.problems import InvalidInput, Problem
from autossl.data.runs import CHECKPOINT_FINAL, IDENTITY, RUN_FILE, RunSpec, read_run
from autossl.data.splits import Fold
from autossl.inference.checkpoint import read_checkpoint
from autossl.trainers.base import Parts

logger = logging.getLogger(__name__)

NAMED_CASES = 5
WITHOUT_UNLABELED = "supervised"
"""The method that is given no unlabeled case, although its folds list them."""


@dataclass(frozen=True)
class InitReport:
    """What happened to the weights of one part; names as in its state dict."""

    part: str
    loaded: tuple[str, ...]
    other_shape: tuple[str, ...]
    not_in_file: tuple[str, ...]

    def __str__(self) -> str:
        text = f"{self.part}: {len(self.loaded)} weights taken over"
        for words, names in (("of another shape", self.other_shape), ("not in the file", self.not_in_file)):
            if names:
                text += f", {len(names)} {words} ({', '.join(names[:3])}{', …' if len(names) > 3 else ''})"
        return text

    def to_json(self) -> dict[str, Any]:
        """For run.json: how many fitted, and the names of those that did not."""
        return {
            "loaded": len(self.loaded),
            "other_shape": list(self.other_shape),
            "not_in_file": list(self.not_in_file),
        }


def initial_checkpoint(source: Path, fold: str) -> Path:
    """The file that a fold starts from: `source` itself, or the final weights of the same fold of a run's folder.

    Raises:
        InvalidInput: the run has not finished this fold.
    """
    if not source.is_dir():
        return source
    path = source / f"fold_{fold}" / CHECKPOINT_FINAL
    if path.is_file():
        return path
    there = sorted(file.parent.name.removeprefix("fold_") for file in source.glob(f"fold_*/{CHECKPOINT_FINAL}"))
    raise InvalidInput(
        Problem(
            f"--init names a run that has no finished fold {fold}",
            f"one of its finished folds: {', '.join(there)}" if there else "the folder of a run that holds fold_k",
            "train the same folds, finish that run with --resume, or name a checkpoint",
            file=source,
        )
    )


def initial_identity(source: Path) -> str:
    """What tells one starting point from another: a file's hash, or the hash of a run's specification.

    Raises:
        InvalidInput: a folder without a readable run.json.
    """
    if not source.is_dir():
        return file_hash(source)
    spec = read_run(source).model_dump(mode="json")
    return content_hash({name: spec[name] for name in IDENTITY}, 16)


def load_initial_weights(parts: Parts, path: Path) -> list[InitReport]:
    """Puts the weights of a checkpoint's first predicting network into every trained part and follower that fits.

    A part of the same name in the file is preferred. Weights of another shape (a head for other classes) stay fresh.

    Raises:
        InvalidInput: not one of our checkpoints, or no weight of any part matched.
    """
    content = read_checkpoint(path)
    networks: Mapping[str, Mapping[str, Tensor]] = content["networks"]
    first = networks[content["prediction"]["members"][0]["name"]]
    reports = [
        _load(name, module, networks.get(name, first)) for name, module in {**parts.trained, **parts.followers}.items()
    ]
    if not any(report.loaded for report in reports):
        names = ", ".join(report.part for report in reports)
        raise InvalidInput(
            Problem(
                f"no weight of {names} has its name and shape in the file",
                "a checkpoint of a network like the plan's",
                "give a checkpoint of the same configuration and preset, or leave out --init",
                file=path,
            )
        )
    return reports


def initial_record(
    parts: Parts, source: Path, fold: str, cases: Fold, dataset: str, whole: bool = False
) -> dict[str, Any]:
    """What run.json holds of a fold's starting point; loads the weights into `parts` to see what fits.

    `seen` lists the cases of this dataset that the weights were trained on, with or without labels, and those of the
    weights that these were started from; None where the file lies in no run, so that nothing is known. `whole`: every
    weight must fit, because the network predicts before it is trained.

    Raises:
        InvalidInput: as `load_initial_weights`, a weight does not fit though all must, or the weights have seen a case
            that the fold must not train on.
    """
    path = initial_checkpoint(source, fold)
    reports = load_initial_weights(parts, path)
    if whole:
        _check_whole(reports, path)
    origin, run = _origin(path)
    seen = None if run is None else _seen_cases(run, origin, dataset)
    if seen is None:
        logger.warning("--init: nothing tells which cases %s was trained on: leaks cannot be checked", path)
    else:
        _check_seen(path, fold, seen, cases)
    return {
        "hash": file_hash(path),
        "run": None if run is None else f"{run.split}/{path.parent.parent.name}",
        "fold": origin,
        "matched": {report.part: report.to_json() for report in reports},
        "seen": seen,
    }


def _check_whole(reports: list[InitReport], path: Path) -> None:
    partial = [str(report) for report in reports if report.other_shape or report.not_in_file]
    if partial:
        expected = "the network of this plan with all of its weights: it predicts the unlabeled cases before any step"
        fix = "name a run of this configuration and preset (of nnU-Net's models autossl_import_nnunet makes one)"
        raise InvalidInput(Problem("; ".join(partial), expected, fix, file=path))


def _origin(path: Path) -> tuple[str | None, RunSpec | None]:
    """The fold and the run that a checkpoint lies in, where it lies in one."""
    fold, run = path.resolve().parent, path.resolve().parent.parent
    if not fold.name.startswith("fold_") or not (run / RUN_FILE).is_file():
        return None, None
    return fold.name.removeprefix("fold_"), read_run(run)


def _seen_cases(run: RunSpec, fold: str | None, dataset: str) -> list[str] | None:
    if run.dataset != dataset:
        return []
    trained = run.folds.get(str(fold))
    if trained is None:
        return None
    before = run.initial.get(str(fold), {"seen": []})["seen"]
    without_label = () if run.method == WITHOUT_UNLABELED else trained.unlabeled
    return None if before is None else sorted({*trained.labeled, *without_label, *before})


def _check_seen(path: Path, fold: str, seen: list[str], cases: Fold) -> None:
    """No validation or test case of the fold, and nothing that would leak one, may have made the weights."""
    leaked = sorted(set(seen) & {*cases.validation, *cases.hidden_test, *cases.excluded})
    if leaked:
        more = f" and {len(leaked) - NAMED_CASES} more" if len(leaked) > NAMED_CASES else ""
        raise InvalidInput(
            Problem(
                f"the weights to start from were trained on {len(leaked)} cases that fold {fold} keeps out of its "
                f"training, or on their images without labels: {', '.join(leaked[:NAMED_CASES])}{more}",
                "weights that know no validation case of the fold",
                "name the folder of a supervised run, so that each fold starts from its own weights; or train fold all",
                file=path,
            )
        )


@torch.no_grad()
def _load(part: str, module: nn.Module, weights: Mapping[str, Tensor]) -> InitReport:
    own = module.state_dict()
    fitting = {name: weights[name] for name in own if name in weights and weights[name].shape == own[name].shape}
    module.load_state_dict({**own, **fitting})
    return InitReport(
        part,
        loaded=tuple(fitting),
        other_shape=tuple(name for name in own if name in weights and name not in fitting),
        not_in_file=tuple(name for name in own if name not in weights),
    )
