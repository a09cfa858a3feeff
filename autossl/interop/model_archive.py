"""A final model as one zip file, and back: weights, plans, inference plan with its postprocessing, model card.

    manifest.json                          every other file with its size and SHA-256
    model_card.md                          for people
    inference_plan.json                    which runs predict together, and the postprocessing rules
    RUN/run.json, plans.json, dataset.json
    RUN/fold_k/checkpoint_final.pth        the networks that predict, and nothing of their training

Installed, the files lie in `results/DATASET/NAME/`, where a workspace has its runs: `autossl_predict -d DATASET` and
`autossl_predict --model FOLDER` find them without the dataset. Nothing in an archive is executed.
"""

from __future__ import annotations

import re
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, Field

from autossl.data.files import atomic_write, file_hash, write_json
from autossl.data.problems import InvalidInput, Problem
from autossl.data.provenance import Written
from autossl.data.runs import CHECKPOINT_FINAL, RUN_FILE, RunFilter
from autossl.inference.inference_plan import INFERENCE_PLAN_FILE, InferencePlan, write_inference_plan
from autossl.inference.model_folder import DESCRIPTION_FILE, PLANS_FILE
from autossl.interop.deployed import deployed_checkpoint, is_public, shared_description, shared_plans, shared_run
from autossl.interop.model_card import CardFacts, model_card
from autossl.interop.model_source import ModelSource, find_model
from autossl.planners.plans import write_plans

MANIFEST_FILE = "manifest.json"
CARD_FILE = "model_card.md"
INSTALLED_PREFIX = "installed-"
"""Before the split's name: an installed model never mixes with runs of the split of that name."""
NOT_PUBLIC = "The reason names cases, and stayed where the model was made."
SHA256_DIGITS = 64
_PART = r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}(?<![.])"
FOLDER_NAME = re.compile(rf"^{_PART}\Z")
"""Of a dataset, a split or a run: no separators, no leading dot, nothing that Windows refuses."""
_FILE = re.compile(
    rf"^(?:{re.escape(MANIFEST_FILE)}|{re.escape(CARD_FILE)}|{re.escape(INFERENCE_PLAN_FILE)}"
    rf"|{_PART}/(?:run|plans|dataset)\.json|{_PART}/fold_(?:\d{{1,3}}|all)/{re.escape(CHECKPOINT_FINAL)})\Z"
)

OnFile = Callable[[str, int, int], None]
"""Told the file that is being worked on, how many are done, and how many there are."""


class ManifestFile(BaseModel):
    """One file of the archive."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    n_bytes: int = Field(ge=0)
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")


class Manifest(BaseModel):
    """manifest.json."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: Literal["autossl-model-1"] = "autossl-model-1"
    dataset: str
    name: str
    """Of the folder that it is installed to."""
    files: dict[str, ManifestFile]
    written: Written


@dataclass(frozen=True)
class ExportRequest:
    """What to share, and where to."""

    model: str | Path
    """A dataset, a folder that holds inference_plan.json, or a run folder; see `find_model`."""
    output: Path
    """The zip file."""
    workspace: Path | None = None
    run: RunFilter = field(default_factory=RunFilter)
    """Which of the dataset's splits."""
    folds: tuple[str, ...] | None = None
    """Of a single run; None: all finished integer folds."""
    overwrite: bool = False


@dataclass(frozen=True)
class ExportResult:
    """What was written."""

    output: Path
    n_bytes: int
    dataset: str
    members: tuple[tuple[str, tuple[str, ...]], ...]
    """Name and folds of each run."""
    n_bytes_left: int
    """Of the checkpoints: what only training needs."""


def belongs_into_archive(name: str) -> bool:
    """Whether a model archive holds a file of this name; nothing else is ever unpacked."""
    return bool(_FILE.match(name)) and ".." not in name


def export_model(request: ExportRequest, on_file: OnFile | None = None) -> ExportResult:
    """Writes a model as a zip file that predicts bit for bit as the model does.

    Raises:
        InvalidInput: no such model, one of its files is damaged, or the output is there already.
    """
    output = Path(request.output)
    _check_output(output, request.overwrite)
    source = find_model(request.model, request.workspace, request.run, request.folds)
    _check_names(source)
    before = sum(member.checkpoint(fold).stat().st_size for member in source.members for fold in member.folds)
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".export-", dir=output.parent) as staging:
        folder = Path(staging)
        after = _write_model(folder, source, on_file)
        written = {p.relative_to(folder).as_posix(): p for p in sorted(folder.rglob("*")) if p.is_file()}
        manifest = Manifest(
            dataset=source.plan.dataset,
            name=installed_name(source.plan.split),
            files={
                name: ManifestFile(n_bytes=path.stat().st_size, sha256=file_hash(path, SHA256_DIGITS))
                for name, path in written.items()
            },
            written=Written.now(),
        )
        write_json(folder / MANIFEST_FILE, manifest.model_dump(mode="json"))
        write_zip(output, {MANIFEST_FILE: folder / MANIFEST_FILE, **written})
    members = tuple((member.folder.name, member.folds) for member in source.members)
    return ExportResult(output, output.stat().st_size, source.plan.dataset, members, before - after)


def installed_name(split: str) -> str:
    """Name of the folder that a model of this split is installed to."""
    return INSTALLED_PREFIX + split.removeprefix(INSTALLED_PREFIX)


def relocated(plan: InferencePlan, name: str) -> InferencePlan:
    """The plan with its members in results/DATASET/`name`."""
    members = tuple(
        member.model_copy(update={"run": f"{plan.dataset}/{name}/{member.name}"}) for member in plan.members
    )
    return plan.model_copy(update={"split": name, "members": members})


def _write_model(folder: Path, source: ModelSource, on_file: OnFile | None) -> int:
    """All files but the manifest; returns the size of the weights."""
    plan, name = source.plan, installed_name(source.plan.split)
    total, done, n_bytes = sum(len(member.folds) for member in source.members), 0, 0
    for member in source.members:
        run = folder / member.folder.name
        write_json(run / RUN_FILE, shared_run(member.run, name).model_dump(mode="json"))
        write_plans(run / PLANS_FILE, shared_plans(member.plans, member.run.configuration, source.names))
        write_json(run / DESCRIPTION_FILE, shared_description(member.description).to_json())
        for fold in member.folds:
            if on_file is not None:
                on_file(f"{member.folder.name}, fold {fold}", done, total)
            target = run / f"fold_{fold}" / CHECKPOINT_FINAL
            target.parent.mkdir()
            torch.save(deployed_checkpoint(member.checkpoint(fold)), target)
            n_bytes, done = n_bytes + target.stat().st_size, done + 1
    facts = CardFacts(plan, source.members, source.fingerprint, source.verdict, source.names)
    (folder / CARD_FILE).write_text(model_card(facts), encoding="utf-8")
    why = plan.why if is_public(plan.why, source.names) else NOT_PUBLIC
    shared = relocated(plan, name).model_copy(update={"why": why})
    write_inference_plan(folder / INFERENCE_PLAN_FILE, shared)
    return n_bytes


def write_zip(output: Path, files: dict[str, Path]) -> None:
    """Weights are stored as they are, texts compressed; without the times and rights of the files here."""
    with atomic_write(output) as partial, zipfile.ZipFile(partial, "w") as archive:
        for name, path in files.items():
            entry = zipfile.ZipInfo(name)
            entry.external_attr = 0o644 << 16
            entry.compress_type = zipfile.ZIP_STORED if path.suffix == ".pth" else zipfile.ZIP_DEFLATED
            entry.file_size = path.stat().st_size
            with path.open("rb") as source, archive.open(entry, "w") as target:
                while block := source.read(1 << 20):
                    target.write(block)


def _check_output(output: Path, overwrite: bool) -> None:
    problems = []
    if output.suffix.lower() != ".zip":
        problems.append(Problem(f"the output '{output.name}'", "a file that ends in .zip", "name it MODEL.zip"))
    if output.is_dir() or (output.exists() and not overwrite):
        problems.append(Problem("it is there already", "a new file", "name another, or give --overwrite", file=output))
    if problems:
        raise InvalidInput(problems)


def _check_names(source: ModelSource) -> None:
    """What becomes a folder's name on another machine."""
    folders = [member.folder.name for member in source.members]
    problems = [
        Problem(
            f"the name '{name}'",
            "letters, digits, '.', '-' and '_', a letter or digit first",
            "rename a copy of the folder and export that",
        )
        for name in (source.plan.dataset, source.plan.split, *folders)
        if not FOLDER_NAME.match(name)
    ]
    if len({name.casefold() for name in folders}) < len(folders):
        problems.append(
            Problem("two runs of one name", "a name for each", "rename one folder, and correct the inference plan")
        )
    if problems:
        raise InvalidInput(problems)
