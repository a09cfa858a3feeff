"""Installs a model archive: everything in it is checked, then one rename puts the model into its place."""

from __future__ import annotations

import json
import logging
import shutil
import tempfile
import time
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

from pydantic import ValidationError

from autossl.data.archive_files import REFUSE, ArchiveFile, check_stored_only, open_archive, read_text, unpack
from autossl.data.files import read_json, replace_folder, write_json
from autossl.data.problems import InvalidInput, Problem
from autossl.data.runs import CHECKPOINT_FINAL, RUN_FILE, read_run
from autossl.data.workspace import DATASET_NAME, Workspace
from autossl.inference.final_model import planned_model
from autossl.inference.inference_plan import (
    INFERENCE_PLAN_FILE,
    InferencePlan,
    read_inference_plan,
    write_inference_plan,
)
from autossl.inference.postprocess import check_rules
from autossl.interop.deployed import check_weights
from autossl.interop.model_archive import (
    CARD_FILE,
    FOLDER_NAME,
    MANIFEST_FILE,
    Manifest,
    OnFile,
    belongs_into_archive,
    installed_name,
    relocated,
)

logger = logging.getLogger(__name__)

STAGING_PREFIX = ".installing-"
STALE_SECONDS = 24 * 3600
"""What an install that was killed left behind is removed after a day."""


@dataclass(frozen=True)
class InstallRequest:
    """Which archive, and where to."""

    archive: Path
    workspace: Path | None = None
    name: str | None = None
    """Of the folder below results/DATASET, "installed-" before it; None: as the archive says, by its split."""
    overwrite: bool = False
    """Replaces an installed model of that name; a folder of runs is never replaced."""


@dataclass(frozen=True)
class InstallResult:
    """What was installed."""

    folder: Path
    dataset: str
    members: tuple[tuple[Path, tuple[str, ...]], ...]
    """Folder and folds of each run."""
    already: bool = False
    """It was there, from the same archive."""

    @property
    def card(self) -> Path:
        """The model card."""
        return self.folder / CARD_FILE


def install_model(request: InstallRequest, on_file: OnFile | None = None) -> InstallResult:
    """Puts a shared model into a workspace, where `autossl_predict -d DATASET` finds it.

    Raises:
        InvalidInput: the archive is damaged, not ours, or holds what does not belong into one; the place is taken; or
            the disk has too little space. Nothing is left behind then.
    """
    archive = Path(request.archive)
    with open_archive(archive, belongs_into_archive) as (content, files):
        manifest = _manifest(content, archive)
        _check_manifest(manifest, files, archive)
        name = _name(request.name or manifest.name)
        target = Workspace.locate(request.workspace).results_folder(manifest.dataset) / name
        if _is_installed(target, manifest, request.overwrite):
            return _result(target, read_inference_plan(target / INFERENCE_PLAN_FILE), already=True)
        with staging_folder(target.parent, sum(file.n_bytes for file in files)) as staging:
            staged = Workspace(staging).results_folder(manifest.dataset) / name
            with _as_the_archives(archive, staged):
                _unpack_all(content, manifest, staged, on_file)
                plan = _check_model(staging, staged, manifest, name)
            replace_folder(staged, target, staging / "replaced")
    return _result(target, plan)


def _result(target: Path, plan: InferencePlan, already: bool = False) -> InstallResult:
    members = tuple((target / member.name, member.folds) for member in plan.members)
    return InstallResult(target, plan.dataset, members, already)


def _manifest(content: zipfile.ZipFile, archive: Path) -> Manifest:
    try:
        return Manifest.model_validate(json.loads(read_text(content, MANIFEST_FILE)))
    except KeyError:
        found = f"there is no {MANIFEST_FILE} in it"
    except ValidationError as error:
        faults = error.errors()[:5]
        found = f"{MANIFEST_FILE}: " + "; ".join(f"{'.'.join(map(str, f['loc']))}: {f['msg']}" for f in faults)
    except InvalidInput:
        raise
    except (ValueError, RecursionError) as error:
        found = f"{MANIFEST_FILE} is no JSON ({str(error)[:200]})"
    raise InvalidInput(Problem(found, "an archive that autossl_export_model wrote", "ask for another", file=archive))


def _check_manifest(manifest: Manifest, files: Sequence[ArchiveFile], archive: Path) -> None:
    """Names are in order, and the archive holds just what the manifest says."""
    there = {file.name: file.n_bytes for file in files if file.name != MANIFEST_FILE}
    said = {name: entry.n_bytes for name, entry in manifest.files.items()}
    problems = []
    if not DATASET_NAME.match(manifest.dataset) or not FOLDER_NAME.match(manifest.dataset):
        problems.append((f"the dataset's name {manifest.dataset!r}", "a name like Dataset004_Hippocampus"))
    if not FOLDER_NAME.match(manifest.name):
        problems.append((f"the folder's name {manifest.name!r}", "letters, digits, '.', '-' and '_'"))
    for name in sorted(set(there) ^ set(said)):
        found = f"{name!r} is {'not in the manifest' if name in there else 'missing'}"
        problems.append((found, "the files that the manifest lists"))
    for name in sorted(set(there) & set(said)):
        if there[name] != said[name]:
            problems.append((f"{name} has {there[name]:,} bytes, the manifest says {said[name]:,}", "the same"))
    if INFERENCE_PLAN_FILE not in said:
        problems.append((f"there is no {INFERENCE_PLAN_FILE} in it", "a whole model"))
    if problems:
        raise InvalidInput([Problem(found, expected, REFUSE, file=archive) for found, expected in problems])


def _name(wanted: str) -> str:
    name = installed_name(wanted)
    if not FOLDER_NAME.match(name):
        raise InvalidInput(
            Problem(f"the name '{wanted}'", "letters, digits, '.', '-' and '_'", "choose another --name")
        )
    return name


def _is_installed(target: Path, manifest: Manifest, overwrite: bool) -> bool:
    """Whether this very model is there; raises where something else is and may not be replaced."""
    if not target.exists():
        return False
    before: Manifest | None = None
    if (target / MANIFEST_FILE).is_file():
        try:
            before = Manifest.model_validate(read_json(target / MANIFEST_FILE))
        except (ValidationError, InvalidInput):
            logger.warning("%s is damaged", target / MANIFEST_FILE)
        else:
            if before == manifest and not overwrite:
                return True
        if overwrite:
            return False
    fix = "choose another --name, or replace it with --overwrite" if before else "choose another --name"
    what = "another model is installed there" if before else "the folder is there and holds no installed model"
    raise InvalidInput(Problem(what, "a folder that is free", fix, file=target))


@contextmanager
def staging_folder(dataset_folder: Path, n_bytes: int) -> Iterator[Path]:
    """A folder on the target's disk that goes again, with the folders that were made for it where nothing came."""
    made = [folder for folder in (dataset_folder, *dataset_folder.parents) if not folder.exists()]
    dataset_folder.mkdir(parents=True, exist_ok=True)
    for old in dataset_folder.glob(f"{STAGING_PREFIX}*"):
        if time.time() - old.stat().st_mtime > STALE_SECONDS:
            shutil.rmtree(old, ignore_errors=True)
    staging = None
    try:
        free = shutil.disk_usage(dataset_folder).free
        if n_bytes > free:
            found, expected = f"{free:,} bytes are free on the disk", f"{n_bytes:,} bytes for the model"
            raise InvalidInput(Problem(found, expected, "free space, or name another --workspace", file=dataset_folder))
        staging = Path(tempfile.mkdtemp(prefix=STAGING_PREFIX, dir=dataset_folder))
        yield staging
    finally:
        if staging is not None:
            shutil.rmtree(staging, ignore_errors=True)
        for folder in made:
            if any(folder.iterdir()):
                break
            folder.rmdir()


@contextmanager
def _as_the_archives(archive: Path, staged: Path) -> Iterator[None]:
    """Faults of staged files are told as the archive's; what hostile JSON can provoke becomes a fault."""
    try:
        yield
    except InvalidInput as error:
        raise InvalidInput([_of_archive(problem, archive, staged) for problem in error.problems]) from error
    except (ValueError, TypeError, LookupError, AttributeError, RuntimeError, ArithmeticError) as error:
        found = f"a file in it makes no sense ({str(error)[:200]})"
        raise InvalidInput(Problem(found, "a model that autossl_export_model wrote", REFUSE, file=archive)) from error


def _of_archive(problem: Problem, archive: Path, staged: Path) -> Problem:
    if problem.file is None or not Path(problem.file).is_relative_to(staged):
        return replace(problem, file=archive)
    return replace(problem, file=archive, found=f"{Path(problem.file).relative_to(staged).as_posix()}: {problem.found}")


def _unpack_all(content: zipfile.ZipFile, manifest: Manifest, staged: Path, on_file: OnFile | None) -> None:
    """Each file is compared with the manifest as it is written."""
    for done, (name, entry) in enumerate(manifest.files.items()):
        if on_file is not None:
            on_file(name, done, len(manifest.files))
        path = staged.joinpath(*PurePosixPath(name).parts)
        path.parent.mkdir(parents=True, exist_ok=True)
        if unpack(content, name, path) != entry.sha256:
            raise InvalidInput(
                Problem("its content is not what the manifest says", f"SHA-256 {entry.sha256}", REFUSE, file=path)
            )


def _check_model(staging: Path, staged: Path, manifest: Manifest, name: str) -> InferencePlan:
    """The model as it will be read, with its new name in it; returns its plan.

    Raises:
        InvalidInput: what predicting would stumble over, weights included.
    """
    plan = relocated(read_inference_plan(staged / INFERENCE_PLAN_FILE), name)
    wanted = {(member.name, fold) for member in plan.members for fold in member.folds}
    weights = {PurePosixPath(file).parts for file in manifest.files if file.endswith(CHECKPOINT_FINAL)}
    if plan.dataset != manifest.dataset or {(run, fold.removeprefix("fold_")) for run, fold, _ in weights} != wanted:
        found = "the inference plan is of other runs, folds or another dataset"
        raise InvalidInput(Problem(found, "the runs in the archive", REFUSE, file=staged / INFERENCE_PLAN_FILE))
    for member in plan.members:
        spec = read_run(staged / member.name)
        write_json(staged / member.name / RUN_FILE, spec.model_copy(update={"split": name}).model_dump(mode="json"))
    write_inference_plan(staged / INFERENCE_PLAN_FILE, plan)
    write_json(staged / MANIFEST_FILE, manifest.model_dump(mode="json"))
    model = planned_model(Workspace(staging), plan, staged / INFERENCE_PLAN_FILE)
    for trained in model.members:
        if trained.run.dataset != plan.dataset:
            found = f"a run of {trained.run.dataset}"
            raise InvalidInput(Problem(found, f"runs of {plan.dataset}", REFUSE, file=trained.folder / RUN_FILE))
        for fold in trained.folds:
            check_stored_only(trained.checkpoint(fold))
            check_weights(trained.checkpoint(fold), trained.plan, trained.schema.n_outputs)
    check_rules(plan.postprocessing, model.first.schema)
    return plan
