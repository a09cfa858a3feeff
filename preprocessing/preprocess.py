"""Preprocesses a dataset's cases into a store: in parallel, and only what is not there yet.

Each array remembers the files it was made from (name, size, time of change) and a checksum. A case is made again when
its images changed or it is damaged, only its label when that came, changed or is read differently, and nothing when all
is as it was. What another configuration or preset prepared in the same way is linked, not computed.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from autossl.data.files import read_json, remove_remnants, write_json
from autossl.data.image_io import read_geometry, read_image, read_label
from autossl.data.integrity import remap_label_map
from autossl.data.labels import LabelSchema
from autossl.data.parallel import parallel_map
from autossl.data.problems import InvalidInput
from autossl.data.raw_dataset import Case, RawDataset
from autossl.data.store import CaseStore, read_source
from autossl.planners.plans import Plans
from autossl.preprocessing.crop import crop, nonzero_region
from autossl.preprocessing.prepare import LabelArray, prepare_case, prepare_label, sample_class_locations
from autossl.preprocessing.resample import target_shape

Outcome = Literal["made", "label made", "linked", "kept"]
Progress = Callable[[int, int, str], None]

PARAMETERS = "parameters.json"
BYTES_PER_VOXEL = 24  # normalized and half-resampled channel, label and what decides its boundaries

logger = logging.getLogger(__name__)

__all__ = ["Outcome", "preprocess_cases"]


def preprocess_cases(
    raw: RawDataset,
    plans: Plans,
    configuration: str,
    store: CaseStore,
    n_workers: int | None = None,
    *,
    remap_labels: Mapping[int, int] | None = None,
    pools: Collection[str] = ("labeled", "unlabeled"),
    progress: Progress | None = None,
) -> dict[str, Outcome]:
    """Fills the store with what is missing of the dataset's cases.

    Args:
        raw: the dataset.
        plans: decide the values.
        configuration: its name in the plans.
        store: usually of the folder data/<plans.data_hash(configuration)>; other stores beside it are looked through
            for cases that can be linked.
        n_workers: processes; 0 or 1: this one, None: one per usable CPU. Fewer cases run at a time where memory
            would not suffice.
        remap_labels: {old: new} label values.
        pools: of the cases to preprocess.
        progress: called with (done, total, case id) after each case.

    Returns:
        What was done, by case id.

    Raises:
        InvalidInput: a case cannot be prepared; names it and its file. Cases that were finished stay.
        WorkerError: a worker died; with its own traceback or signal, and the case.
    """
    cases = [case for case in raw.cases if case.pool in pools]
    remove_remnants(store.folder)
    write_parameters(store, plans, configuration)
    work = _CaseWork(
        plans=plans,
        configuration=configuration,
        store=store,
        others=_stores_beside(store),
        schema=raw.description.label_schema(),
        remap_labels=dict(remap_labels or {}),
    )
    outcomes: dict[str, Outcome] = {}
    results = parallel_map(work.run, cases, n_workers, name_of=lambda case: case.id, bytes_of=work.peak_bytes)
    for case, outcome in zip(cases, results, strict=True):
        outcomes[case.id] = outcome
        if progress is not None:
            progress(len(outcomes), len(cases), case.id)
    counts = Counter(outcomes.values())
    logger.info("%s: %s", configuration, ", ".join(f"{n} {outcome}" for outcome, n in sorted(counts.items())))
    return outcomes


def write_parameters(store: CaseStore, plans: Plans, configuration: str) -> None:
    """Says in the store's folder what its name, a hash, stands for."""
    content = plans.data_parameters(configuration)
    path = store.folder / PARAMETERS
    try:
        if read_json(path) == content:
            return
    except InvalidInput:
        pass
    write_json(path, content)


@dataclass(frozen=True)
class _CaseWork:
    """What a worker needs beside the case."""

    plans: Plans
    configuration: str
    store: CaseStore
    others: tuple[CaseStore, ...]
    schema: LabelSchema
    remap_labels: dict[int, int] = field(default_factory=dict)

    def run(self, case: Case) -> Outcome:
        """Makes what is missing of a case."""
        if self._has_image(self.store, case):
            if case.label is None or self._has_label(self.store, case):
                return "kept"
            self._add_label(case, case.label)
            return "label made"
        other = next((other for other in self.others if self._is_shared(other, case)), None)
        if other is not None:
            with_label = case.label is not None and self._has_label(other, case)
            self.store.share(case.id, other, with_label)
            if case.label is not None and not with_label:
                self._add_label(case, case.label)
            return "linked"
        self._make(case)
        return "made"

    def peak_bytes(self, case: Case) -> int:
        """Estimated peak memory; 0 where the header cannot be read (the error then comes from reading the case)."""
        try:
            geometry = read_geometry(case.images[0], self.plans.orientation)
        except (InvalidInput, OSError):
            return 0
        plan = self.plans.configuration(self.configuration)
        shape = [geometry.shape_zyx[axis] for axis in self.plans.transpose_forward]
        spacing = [geometry.spacing_zyx_mm[axis] for axis in self.plans.transpose_forward]
        target = [*spacing[: 3 - plan.dims], *plan.spacing]
        before, after = _product(shape), _product(target_shape(shape, spacing, target))
        return 4 * plan.n_channels * (before + after) + BYTES_PER_VOXEL * max(before, after)

    def _make(self, case: Case) -> None:
        image_source, label_source = file_stamps(*case.images), self._label_source(case)
        image = read_image(case.images, self.plans.orientation)
        label = None if case.label is None else self._read_label(case.label)
        with _named(case.label or case.images[0]):
            prepared = prepare_case(image, label, self.plans, self.configuration)
        if prepared.label is not None:
            prepared = replace(prepared, locations=sample_class_locations(prepared.label, self.schema))
        self.store.write(case.id, prepared, image_source, label_source)

    def _add_label(self, case: Case, file: Path) -> None:
        properties, source = self.store.properties(case.id), self._label_source(case)
        nonzero = None
        if properties.shape != properties.shape_after_crop:
            image = read_image(case.images, self.plans.orientation).array
            transposed = image.transpose(0, *(axis + 1 for axis in properties.transpose_forward))
            nonzero = nonzero_region(crop(transposed, properties.crop_box))
        plan = self.plans.configuration(self.configuration)
        with _named(file):
            label = prepare_label(self._read_label(file), nonzero, properties, plan)
        self.store.write_label(case.id, label, sample_class_locations(label, self.schema), source)

    def _read_label(self, file: Path) -> LabelArray:
        return remap_label_map(read_label(file, self.plans.orientation)[0], self.remap_labels)

    def _label_source(self, case: Case) -> dict[str, Any]:
        """The label's file, and how its values are read: both make the stored label and its locations."""
        return {
            "files": file_stamps(*([case.label] if case.label else [])),
            "remap": sorted([old, new] for old, new in self.remap_labels.items() if old != new),
            "classes": [[name, list(values)] for name, values in self.schema.names.items()],
        }

    def _has_image(self, store: CaseStore, case: Case) -> bool:
        stamps = file_stamps(*case.images)
        return (
            store.has(case.id, labeled=False)
            and _source(store.image_path(case.id)) == stamps
            and not _damaged(store, case, labeled=False)
        )

    def _has_label(self, store: CaseStore, case: Case) -> bool:
        return (
            store.has(case.id, labeled=True)
            and _source(store.label_path(case.id)) == self._label_source(case)
            and not _damaged(store, case, labeled=True)
        )

    def _is_shared(self, other: CaseStore, case: Case) -> bool:
        """Whether another store holds the very values that this one would get."""
        if not other.properties_path(case.id).exists() or not self._has_image(other, case):
            return False
        properties = other.properties(case.id)
        return properties.values_hash == self.plans.data_hash(self.configuration, properties.spacing_mm[0])


def file_stamps(*files: Path) -> dict[str, list[int]]:
    """Name → size in bytes and time of change in ns of files, to notice that one was replaced."""
    states = {file.name: file.stat() for file in files if file.exists()}
    return {name: [state.st_size, state.st_mtime_ns] for name, state in states.items()}


def _stores_beside(store: CaseStore) -> tuple[CaseStore, ...]:
    folders = sorted(path.parent for path in store.folder.parent.glob(f"*/{PARAMETERS}"))
    return tuple(CaseStore(folder) for folder in folders if folder != store.folder)


def _source(path: Path) -> Any:
    try:
        return read_source(path)
    except InvalidInput:
        return None


def _damaged(store: CaseStore, case: Case, labeled: bool) -> bool:
    """Whether content does not fit its checksum; says of which file."""
    damaged = store.damaged(case.id, labeled)
    for path, damage in damaged.items():
        logger.warning("%s: %s; it is made again", path, damage)
    return bool(damaged)


def _product(shape: Any) -> int:
    z, y, x = shape
    return int(z) * int(y) * int(x)


@contextmanager
def _named(file: Path) -> Iterator[None]:
    """Adds the file to the problems of what is raised inside."""
    try:
        yield
    except InvalidInput as error:
        raise InvalidInput([replace(problem, file=problem.file or file) for problem in error.problems]) from error
