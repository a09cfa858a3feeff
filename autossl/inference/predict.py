"""Predicts a folder of images with a run, or with the runs of an inference plan: the function behind `autossl_predict`.

Everything that can be wrong with the request is checked before the first image is predicted. Reading the next case and
writing the last one go on beside the network in threads of this process; weights are loaded once.
"""

from __future__ import annotations

import logging
import platform
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from autossl.data.case_files import case_files, modality_files
from autossl.data.files import read_json, remove_remnants, write_json
from autossl.data.geometry import Geometry
from autossl.data.locks import hold
from autossl.data.prepared import PreparedCase
from autossl.data.probabilities import PROBABILITIES_FOLDER
from autossl.data.problems import InvalidInput, Problem
from autossl.data.runs import RunFilter, choose_run
from autossl.data.workspace import Workspace
from autossl.inference.backends import Backend, backend_version, choose_backend
from autossl.inference.final_model import FinalModel, LoadedModel, planned_model
from autossl.inference.inference_plan import (
    INFERENCE_PLAN_FILE,
    choose_inference_plan,
    read_inference_plan,
    workspace_of_plan,
)
from autossl.inference.model_folder import DESCRIPTION_FILE, PLANS_FILE, read_model
from autossl.inference.outputs import OutputFolder
from autossl.inference.postprocess import Rule, apply_rules, check_rules
from autossl.inference.restore import Restored, Wanted
from autossl.networks.device import resolve_device
from autossl.planners.plans import write_plans
from autossl.version import __version__

logger = logging.getLogger(__name__)

RECORD_FILE = "prediction.json"
LARGE_CASE_BYTES = 1 << 29
"""From here on cases are read, predicted and written one after the other, so that memory holds one at a time."""
OTHER_WAIT_S = 1.0
"""Our other parts may look at the same moment."""

Files = tuple[Path, ...]


@dataclass(frozen=True)
class PredictRequest:
    """What to predict, with what, where to. `dataset` with `run` names the model, or `model` does."""

    input: Path
    """Folder of images, named as in imagesTr."""
    output: Path
    dataset: str | None = None
    run: RunFilter = field(default_factory=RunFilter)
    """Which of the dataset's runs; exactly one must fit. Where this says no more than the split, the split's inference
    plan predicts (see `choose_inference_plan`)."""
    workspace: Path | None = None
    model: Path | None = None
    """The folder that holds fold_k, or results/DATASET/SPLIT with its inference plan, instead of a dataset."""
    folds: tuple[str, ...] | None = None
    """None: all finished integer folds, or those of the inference plan. Given, one run predicts."""
    modality: str | None = None
    """A channel or channel group of dataset.json to predict from alone; None: as deployed, all channels must be there.
    `input` needs its files only."""
    save_probabilities: bool = False
    save_uncertainty: bool = False
    """See `Restored.entropy` and `Restored.disagreement`."""
    postprocessing: tuple[Rule, ...] = ()
    """Applied to the label maps in this order, after the rules of an inference plan; probabilities and uncertainty
    stay as predicted."""
    mirroring: bool = True
    step_size: float = 0.5
    resume: bool = False
    """Skips cases whose results are complete."""
    overwrite: bool = False
    """Predicts again what is there."""
    num_parts: int = 1
    part_id: int = 0
    """Of the cases by name, each `num_parts`-th from this one on; for several machines with one output folder."""
    device: str = "auto"
    backend: str = "auto"
    """What computes the networks, one of `BACKENDS`; on `resume` auto stays with what the folder's record names."""


@dataclass(frozen=True)
class PredictResult:
    """What was done."""

    members: tuple[tuple[Path, tuple[str, ...]], ...]
    """Folder and folds of each run; several where an ensemble predicted."""
    plan: Path | None
    """The inference plan that named them."""
    output: Path
    predicted: tuple[str, ...]
    """Cases, in the order of prediction."""
    skipped: tuple[str, ...]
    """Cases whose results were there (`resume`)."""
    backend: str
    """What computed the networks, with its version, and the device."""

    @property
    def model(self) -> Path:
        """Folder of the (first) run."""
        return self.members[0][0]

    @property
    def folds(self) -> tuple[str, ...]:
        """Of the (first) run."""
        return self.members[0][1]


@dataclass(frozen=True)
class PredictProgress:
    """Told to the caller's callback."""

    case: str
    done: int
    """Cases finished before this one."""
    total: int
    share: float
    """Of this case, 0 to 1."""


OnProgress = Callable[[PredictProgress], None]


def predict(request: PredictRequest, on_progress: OnProgress | None = None) -> PredictResult:
    """Predicts every case of a folder.

    Beside the results of the cases (see `OutputFolder`) the folder gets plans.json, dataset.json and prediction.json,
    which says what predicted.

    Raises:
        InvalidInput: the request, the model or the images are wrong (nothing is written then), or single images could
            not be read (the others are predicted, and all that failed are named); or another process predicts into the
            same folder.
    """
    _check_request(request)
    device = resolve_device(request.device)
    chosen_model = _choose_model(request)
    model = chosen_model.model
    channels = None if request.modality is None else model.modality(request.modality)
    check_rules(chosen_model.rules, model.first.schema)
    cases = _cases(request, model, channels)
    chosen = dict(list(cases.items())[request.part_id :: request.num_parts])
    wanted = Wanted(request.save_probabilities, request.save_uncertainty)
    outputs = OutputFolder(request.output, model.first.description.file_ending, wanted, model.n_voters)
    asked = _asked_backend(request, device)
    record = _record(request, chosen_model, channels) | {"backend": asked}
    with _held(request):
        skipped = _check_outputs(request, outputs, chosen, record)
        if request.num_parts == 1:  # of several, another may be writing
            for folder in (Path(request.output), Path(request.output) / PROBABILITIES_FOLDER):
                remove_remnants(folder, below=False)  # other folders in it may be another command's
        loaded = model.load(device, request.mirroring, request.step_size, channels, asked)
        computed_by = _say_who_computes(record, loaded.backend, device)
        todo = {case: files for case, files in chosen.items() if case not in skipped}
        replaced = tuple(todo) if request.overwrite else ()
        job = _Job(loaded, outputs, wanted, record, chosen_model.rules, replaced)
        members = tuple((member.folder, member.folds) for member in model.members)
        named = " and ".join(f"{folder}, fold {', '.join(folds)}" for folder, folds in members)
        logger.info("%d cases with %s, by %s", len(todo), named, computed_by)
        predicted, problems = _predict_all(job, todo, on_progress)
    if problems:
        title = f"{len(todo) - len(predicted)} of {len(todo)} cases could not be predicted; the others are done:"
        raise InvalidInput(problems, title=title)
    return PredictResult(members, chosen_model.plan, request.output, tuple(predicted), tuple(skipped), computed_by)


@contextmanager
def _held(request: PredictRequest) -> Iterator[None]:
    """One process at a time predicts a part; the parts may be predicted side by side, other shares not beside them."""
    folder, work = Path(request.output), f"predictions into {request.output}"
    ours = f"-of-{request.num_parts}.lock"
    with hold(folder / f".prediction-{request.part_id}{ours}", work):
        for path in sorted(folder.glob(".prediction-*-of-*.lock")):
            if not path.name.endswith(ours):
                with hold(path, work, OTHER_WAIT_S):  # nobody's now; one that starts later sees ours
                    pass
        yield


@dataclass(frozen=True)
class _ChosenModel:
    """What a request names."""

    model: FinalModel
    rules: tuple[Rule, ...]
    plan: Path | None = None


@dataclass(frozen=True)
class _Job:
    loaded: LoadedModel
    outputs: OutputFolder
    wanted: Wanted
    record: Mapping[str, Any]
    rules: tuple[Rule, ...] = ()
    replaced: tuple[str, ...] = ()
    """Cases of `overwrite`."""

    def read(self, case: str, files: Files) -> tuple[PreparedCase, ...]:
        """Reads and preprocesses a case."""
        with _named("reading", case):
            return self.loaded.prepare(case, files)

    def finish(self, case: str, restored: Restored, geometry: Geometry) -> None:
        """Tidies the label map by the rules and writes the case."""
        with _named("writing", case):
            if self.rules:
                schema = self.loaded.model.first.schema
                tidied = apply_rules(restored.label_map, self.rules, schema, geometry.spacing_zyx_mm)
                restored = replace(restored, label_map=tidied)
            self.outputs.write(case, restored, geometry)

    def open_folder(self) -> None:
        """Makes the output folder and says in it what predicts; by then no result of anything else may be there."""
        folder, first = self.outputs.folder, self.loaded.model.first
        folder.mkdir(parents=True, exist_ok=True)
        for case in self.replaced:
            self.outputs.label_map(case).unlink(missing_ok=True)
        write_json(folder / DESCRIPTION_FILE, first.description.to_json())
        write_plans(folder / PLANS_FILE, first.plans)
        write_json(folder / RECORD_FILE, dict(self.record))


def _cases(request: PredictRequest, model: FinalModel, channels: tuple[int, ...] | None) -> dict[str, Files]:
    """The files of each case; where channels are missing and the model could do without them, the error says so."""
    first = model.first
    ending, n_channels = first.description.file_ending, first.plan.n_channels
    if channels is not None:
        return modality_files(request.input, ending, channels)
    try:
        return case_files(request.input, ending, n_channels)
    except InvalidInput as error:
        alone = [found for found in model.separate_modalities() if len(found) < n_channels] if n_channels > 1 else []
        if not alone or not any("missing" in problem.found for problem in error.problems):
            raise
        names = first.description.channels.listed(sorted(found) for found in alone)
        hint = f"; or predict from one modality alone with --modality: {names}"
        raise InvalidInput([replace(problem, fix=problem.fix + hint) for problem in error.problems]) from error


def _predict_all(
    job: _Job, todo: Mapping[str, Files], on_progress: OnProgress | None
) -> tuple[list[str], list[Problem]]:
    """Cases that were predicted, and what was wrong with the others."""
    predicted: list[str] = []
    problems: list[Problem] = []
    names = list(todo)
    reader, writer = ThreadPoolExecutor(1), ThreadPoolExecutor(1)
    pending: Future[None] | None = None
    upcoming: Future[tuple[PreparedCase, ...]] | None = None
    try:
        for index, case in enumerate(names):
            reading = upcoming or reader.submit(job.read, case, todo[case])
            upcoming, following = None, names[index + 1 : index + 2]
            try:
                prepared = reading.result()
                large = sum(one.image.nbytes for one in prepared) > LARGE_CASE_BYTES
                upcoming = next((reader.submit(job.read, name, todo[name]) for name in following if not large), None)
                if not predicted:
                    job.open_folder()
                restored = _predict_one(job, prepared, PredictProgress(case, index, len(names), 0.0), on_progress)
            except InvalidInput as error:
                logger.error("%s", error)
                problems += [replace(problem, case=case) for problem in error.problems]
                continue
            if pending is not None:
                pending.result()
            pending = writer.submit(job.finish, case, restored, prepared[0].properties.geometry)
            del restored, prepared, reading
            if large:
                pending.result()
            predicted.append(case)
        if pending is not None:
            pending.result()
    finally:
        reader.shutdown(cancel_futures=True)
        writer.shutdown()
    return predicted, problems


def _predict_one(
    job: _Job, prepared: tuple[PreparedCase, ...], progress: PredictProgress, on_progress: OnProgress | None
) -> Restored:
    def on_share(share: float) -> None:
        if on_progress is not None:
            on_progress(replace(progress, share=share))

    on_share(0.0)
    with _named("predicting", progress.case):
        restored = job.loaded.predict(prepared, job.wanted, on_share)
    on_share(1.0)
    return restored


@contextmanager
def _named(doing: str, case: str) -> Iterator[None]:
    """What goes wrong beside the main thread says with which case, whatever it is."""
    try:
        yield
    except Exception as error:
        error.add_note(f"while {doing} case {case}")
        raise


def _check_request(request: PredictRequest) -> None:
    problems = []
    if (request.dataset is None) == (request.model is None):
        found = "both a dataset and a model folder" if request.model else "neither a dataset nor a model folder"
        problems.append(Problem(found, "one of -d and --model", "name the trained run by one of them"))
    if request.model is not None and request.run != RunFilter():
        problems.append(
            Problem(f"--model beside {request.run}", "--model alone", "leave out the options that choose among runs")
        )
    if request.resume and request.overwrite:
        problems.append(Problem("--resume and --overwrite together", "one of them", "leave one out"))
    if request.num_parts < 1 or not 0 <= request.part_id < request.num_parts:
        found = f"part {request.part_id} of {request.num_parts}"
        problems.append(Problem(found, "a part from 0 to one less than their number", "correct --part_id"))
    if Path(request.input).resolve() == Path(request.output).resolve():
        fix = "choose another output folder"
        problems.append(
            Problem("results would be written among the images", "two folders", fix, file=Path(request.input))
        )
    if Path(request.output).is_file():
        problems.append(Problem("a file", "an output folder", "choose another", file=Path(request.output)))
    if problems:
        raise InvalidInput(problems)


def _choose_model(request: PredictRequest) -> _ChosenModel:
    """The run, or the runs and rules of an inference plan."""
    folder, path, rules = request.model, None, request.postprocessing
    if folder is None:
        workspace = Workspace.locate(request.workspace)
        dataset = workspace.find_dataset(request.dataset or "")
        path = choose_inference_plan(workspace, dataset, request.run) if request.folds is None else None
        folder = None if path is not None else choose_run(workspace, dataset, request.run).folder
    elif (Path(folder) / INFERENCE_PLAN_FILE).is_file() and request.folds is None:
        path = Path(folder) / INFERENCE_PLAN_FILE
        workspace = workspace_of_plan(path)
    if path is not None:
        plan = read_inference_plan(path)
        return _ChosenModel(planned_model(workspace, plan, path), (*plan.postprocessing, *rules), path)
    return _ChosenModel(FinalModel((read_model(Path(folder or ""), request.folds),)), rules)


def _record(request: PredictRequest, chosen: _ChosenModel, channels: tuple[int, ...] | None) -> dict[str, Any]:
    """What is written to prediction.json."""
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


def _check_outputs(
    request: PredictRequest, outputs: OutputFolder, cases: Mapping[str, Files], record: Mapping[str, Any]
) -> list[str]:
    """Cases to skip; raises where results are there that the request does not allow for."""
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
    now, before = _identity(record), _identity(read_json(path))
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


def _say_who_computes(record: dict[str, Any], backend: Backend, device: str) -> str:
    """Puts into the record what came of the request's backend; gives its name, version and device."""
    version = backend_version(backend)
    record["backend"] = backend
    record["versions"] = {**record["versions"], backend: version}
    return f"{backend} {version} on {device}"


def _asked_backend(request: PredictRequest, device: str) -> str:
    """What to load the networks for; a folder that goes on keeps what computed its other cases."""
    path, asked = Path(request.output) / RECORD_FILE, request.backend
    if asked == "auto" and request.resume and path.is_file():
        asked = read_json(path).get("backend", "torch")
    choose_backend(asked, device)
    return asked


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
