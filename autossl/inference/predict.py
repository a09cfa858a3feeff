"""Predicts a folder of images with a run, or with the runs of an inference plan: the function behind `autossl_predict`.

Everything that can be wrong with the request is checked before the first image is predicted. Reading the next case and
writing the last one go on beside the network in threads of this process; weights are loaded once.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from autossl.data.case_files import case_files, modality_files
from autossl.data.files import remove_remnants, write_json
from autossl.data.geometry import Geometry
from autossl.data.locks import hold
from autossl.data.prepared import PreparedCase
from autossl.data.probabilities import PROBABILITIES_FOLDER
from autossl.data.problems import InvalidInput, Problem
from autossl.inference.choice import choose_model
from autossl.inference.final_model import FinalModel, LoadedModel
from autossl.inference.model_folder import DESCRIPTION_FILE, PLANS_FILE
from autossl.inference.outputs import OutputFolder
from autossl.inference.postprocess import Rule, apply_rules, check_rules
from autossl.inference.record import RECORD_FILE, add_backend, asked_backend, finished_cases, record_of
from autossl.inference.request import PredictRequest, check_request
from autossl.inference.restore import Restored, Wanted
from autossl.networks.device import resolve_device
from autossl.planners.plans import write_plans

logger = logging.getLogger(__name__)

LARGE_CASE_BYTES = 1 << 29
"""From here on cases are read, predicted and written one after the other, so that memory holds one at a time."""
OTHER_WAIT_S = 1.0
"""Our other parts may look at the same moment."""

Files = tuple[Path, ...]


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
    check_request(request)
    device = resolve_device(request.device)
    chosen_model = choose_model(request)
    model = chosen_model.model
    channels = None if request.modality is None else model.modality(request.modality)
    check_rules(chosen_model.rules, model.first.schema)
    cases = _cases(request, model, channels)
    chosen = dict(list(cases.items())[request.part_id :: request.num_parts])
    wanted = Wanted(request.save_probabilities, request.save_uncertainty)
    outputs = OutputFolder(request.output, model.first.description.file_ending, wanted, model.n_voters)
    outputs.check_names(cases)
    asked = asked_backend(request, device)
    record = record_of(request, chosen_model, channels) | {"backend": asked}
    with _held(request):
        skipped = finished_cases(request, outputs, chosen, record)
        if request.num_parts == 1:  # of several, another may be writing
            for folder in (Path(request.output), Path(request.output) / PROBABILITIES_FOLDER):
                remove_remnants(folder, below=False)  # other folders in it may be another command's
        loaded = model.load(device, request.mirroring, request.step_size, channels, asked)
        computed_by = add_backend(record, loaded.backend, device)
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
