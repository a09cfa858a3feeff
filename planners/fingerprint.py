"""The fingerprint of a dataset: what one read of every case told, the basis of plans and of each run's statistics."""

from __future__ import annotations

import contextlib
import logging
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError

from autossl.data.files import PARTIAL, read_json, write_json
from autossl.data.hashes import DuplicatePair, HashedCase, find_duplicates
from autossl.data.integrity import Findings, check_label_numbers, grouped
from autossl.data.parallel import parallel_map
from autossl.data.problems import InvalidInput, Problem, schema_faults
from autossl.data.raw_dataset import Case, RawDataset
from autossl.planners.budget import BudgetStatistics, budget_statistics
from autossl.planners.case_scan import (
    CaseFingerprint,
    CaseScan,
    ScanSettings,
    file_stamps,
    scan_bytes,
    scan_case,
)
from autossl.planners.domain_shift import domain_shift_notes
from autossl.planners.foreground import (
    FOLDER,
    IntensityPool,
    draw_foreground,
    draws_per_case,
    foreground_intensities,
    foreground_path,
    load_foreground,
    pool_properties,
)
from autossl.planners.plans import IntensityProperties

VERSION = 1
"""Of what a scan measures; fingerprints of another version are made anew."""

logger = logging.getLogger(__name__)

__all__ = [
    "BudgetStatistics",
    "CaseFingerprint",
    "Fingerprint",
    "ScanOptions",
    "budget_statistics",
    "extract_fingerprint",
    "foreground_intensities",
    "previous_fingerprint",
    "read_fingerprint",
    "write_fingerprint",
]


class Fingerprint(BaseModel):
    """A dataset in numbers. Only labeled cases enter the pooled figures, as in nnU-Net v2."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    version: int
    dataset_name: str
    orientation: Literal["RAS", "native"]
    labels: dict[str, tuple[int, ...]]
    """As declared when the cases were scanned."""
    channel_names: dict[int, str]
    remap_labels: dict[int, int]
    """OLD → NEW for every read of a raw label map of this dataset; the files themselves stay as they are."""
    cases: dict[str, CaseFingerprint]
    """By id: labeled, unlabeled, test cases in this order."""
    foreground_intensity_properties_per_channel: dict[str, IntensityProperties]
    """Of the labeled foreground, by channel number as text; nnU-Net v2's sampling and numbers."""
    median_relative_size_after_cropping: float
    duplicates: tuple[DuplicatePair, ...]
    """Cases of any pool that show the same image."""
    domain_shift: tuple[str, ...]
    """How the unlabeled cases differ from the labeled ones."""

    def of_pool(self, pool: Literal["labeled", "unlabeled", "test"]) -> dict[str, CaseFingerprint]:
        """The cases of one pool."""
        return {name: case for name, case in self.cases.items() if case.pool == pool}


@dataclass(frozen=True)
class ScanOptions:
    """What a caller may ask of a scan beyond the usual."""

    remap_labels: Mapping[int, int] | None = None
    """OLD → NEW; None keeps the mapping of the previous fingerprint."""
    folder: Path | None = None
    """The preprocessed folder, to keep foreground intensities in; None: they are not kept."""
    known_problems: Sequence[Problem] = ()
    """Found before, to be listed with those of the scan."""
    on_case: Callable[[str, int, int], None] | None = None
    """Called with the id of each case that was scanned, how many are done, and how many there are to do."""


def extract_fingerprint(
    raw: RawDataset,
    orientation: Literal["RAS", "native"] = "RAS",
    n_workers: int | None = None,
    verify: bool = False,
    previous: Fingerprint | None = None,
    options: ScanOptions | None = None,
) -> Fingerprint:
    """Scans every case once: integrity, numbers, hashes. Cases whose files did not change are not read again.

    Args:
        raw: the dataset.
        orientation: of the arrays; "native" for pictures.
        n_workers: processes; None: one per usable CPU.
        verify: reads every case again, whatever the previous fingerprint says.
        previous: an earlier fingerprint of the dataset.
        options: see `ScanOptions`.

    Raises:
        InvalidInput: with every error of every case; nothing was written then.
        WorkerError: where a worker died.
    """
    options = options or ScanOptions()
    findings = Findings(list(options.known_problems))
    settings = _settings(raw, orientation, previous, options)
    findings.add(check_label_numbers(settings.schema, raw.folder / "dataset.json"))
    reuse = _Reuse.of(raw, settings, None if verify else previous, options.folder)
    with _staging(options.folder) as staging:
        results = _run(raw, replace(settings, foreground_folder=staging), reuse, n_workers, options, findings)
        for line in grouped(findings.warnings):
            logger.warning("%s: %s", raw.name, line)
        findings.raise_errors(raw.name)
        if options.folder is not None and staging is not None:
            _publish_foreground(staging, options.folder, [case.id for case in raw.labeled])
    return _assemble(raw, settings, results, reuse)


def read_fingerprint(path: Path) -> Fingerprint:
    """Reads a fingerprint.

    Raises:
        InvalidInput: where the file is missing, damaged or of another version.
    """
    content = read_json(path)
    try:
        return Fingerprint.model_validate(content)
    except ValidationError as error:
        raise InvalidInput(
            Problem(
                f"no fingerprint of this version: {schema_faults(error)[0]}",
                "the file that autossl_plan_and_preprocess writes",
                "run autossl_plan_and_preprocess again; it makes the fingerprint anew",
                file=path,
            )
        ) from error


def previous_fingerprint(path: Path) -> Fingerprint | None:
    """The fingerprint at a path, or None where there is none that can be used."""
    try:
        return read_fingerprint(path) if Path(path).exists() else None
    except InvalidInput as error:
        logger.info("%s is made anew: %s", path, error)
        return None


def write_fingerprint(path: Path, fingerprint: Fingerprint) -> None:
    """Writes a fingerprint atomically."""
    write_json(path, fingerprint.model_dump(mode="json"))


@dataclass(frozen=True)
class _Reuse:
    """What an earlier fingerprint saves."""

    entries: Mapping[str, CaseFingerprint]
    """Cases that did not change."""
    intensities: Mapping[str, IntensityProperties] | None
    """The pooled figures, where no labeled case changed, came or went."""
    foreground_folder: Path | None = None

    @classmethod
    def of(cls, raw: RawDataset, settings: ScanSettings, previous: Fingerprint | None, folder: Path | None) -> _Reuse:
        if previous is None or not _same_terms(previous, raw, settings):
            return cls({}, None)
        entries = {}
        for case in raw.cases:
            entry = previous.cases.get(case.id)
            if entry is not None and entry.files == file_stamps(case, raw.folder):
                entries[case.id] = entry
        labeled = [case.id for case in raw.labeled]
        if labeled == list(previous.of_pool("labeled")) and all(case in entries for case in labeled):
            return cls(entries, previous.foreground_intensity_properties_per_channel)
        # The draws per case depend on the number of labeled cases: they are drawn again, from what was kept of a case.
        return cls(entries, None, folder)


def _same_terms(previous: Fingerprint, raw: RawDataset, settings: ScanSettings) -> bool:
    return (
        previous.version == VERSION
        and previous.orientation == settings.orientation
        and previous.labels == dict(settings.schema.names)
        and previous.remap_labels == settings.remap_labels
        and previous.channel_names == raw.description.channel_names
    )


def _settings(
    raw: RawDataset, orientation: Literal["RAS", "native"], previous: Fingerprint | None, options: ScanOptions
) -> ScanSettings:
    kept = previous.remap_labels if previous is not None else {}
    return ScanSettings(
        folder=raw.folder,
        schema=raw.description.label_schema(),
        n_channels=raw.description.n_channels,
        orientation=orientation,
        n_draws=draws_per_case(len(raw.labeled)) if raw.labeled else 0,
        remap_labels=dict(kept if options.remap_labels is None else options.remap_labels),
        keep_all_foreground=any(name.casefold() == "ct" for name in raw.description.channel_names.values()),
    )


@dataclass
class _Results:
    entries: dict[str, CaseFingerprint] = field(default_factory=dict)
    pools: list[IntensityPool] = field(default_factory=list)


def _run(
    raw: RawDataset,
    settings: ScanSettings,
    reuse: _Reuse,
    n_workers: int | None,
    options: ScanOptions,
    findings: Findings,
) -> _Results:
    """Scans what has to be scanned; findings are added to `findings`."""
    results = _Results()
    to_do = []
    for case in raw.cases:
        if case.id in reuse.entries and (case.pool != "labeled" or reuse.intensities is not None):
            results.entries[case.id] = reuse.entries[case.id]
        else:
            to_do.append(case)
    scan = partial(_scan_or_redraw, settings=settings, reuse=reuse)
    scans = parallel_map(scan, to_do, n_workers, name_of=lambda case: case.id, bytes_of=scan_bytes)
    for number, (case, found) in enumerate(zip(to_do, scans, strict=True), start=1):
        findings.add(found.findings)
        if found.fingerprint is not None:
            results.entries[case.id] = found.fingerprint
        results.pools = results.pools or [IntensityPool() for _ in found.drawn]
        for pool, drawn in zip(results.pools, found.drawn, strict=False):
            pool.add(drawn)
        if options.on_case is not None:
            options.on_case(case.id, number, len(to_do))
    return results


def _scan_or_redraw(case: Case, settings: ScanSettings, reuse: _Reuse) -> CaseScan:
    if case.id in reuse.entries and reuse.foreground_folder is not None:
        with contextlib.suppress(InvalidInput):  # what was kept is damaged: the case is read again
            foreground = load_foreground(foreground_path(reuse.foreground_folder, case.id))
            return CaseScan(reuse.entries[case.id], Findings(), tuple(draw_foreground(foreground, settings.n_draws)))
    return scan_case(case, settings)


def _assemble(raw: RawDataset, settings: ScanSettings, results: _Results, reuse: _Reuse) -> Fingerprint:
    cases = {case.id: results.entries[case.id] for case in raw.cases}
    labeled = [case for case in cases.values() if case.pool == "labeled"]
    unlabeled = [case for case in cases.values() if case.pool == "unlabeled"]
    notes = domain_shift_notes(labeled, unlabeled, raw.description.channel_names)
    hashed = [HashedCase(name, case.voxel_hash, case.robust_hash) for name, case in cases.items()]
    duplicates = find_duplicates(hashed)
    for note in notes:
        logger.warning("%s: the unlabeled cases differ from the labeled ones. %s", raw.name, note)
    for pair in duplicates:
        logger.warning("%s: %s", raw.name, _duplicate_text(pair, cases))
    relative = [case.relative_size_after_crop for case in labeled]
    return Fingerprint(
        version=VERSION,
        dataset_name=raw.name,
        orientation=settings.orientation,
        labels=dict(settings.schema.names),
        channel_names=raw.description.channel_names,
        remap_labels=dict(settings.remap_labels),
        cases=cases,
        foreground_intensity_properties_per_channel=dict(
            pool_properties(results.pools) if reuse.intensities is None else reuse.intensities
        ),
        median_relative_size_after_cropping=float(np.median(relative)) if relative else 1.0,
        duplicates=tuple(duplicates),
        domain_shift=tuple(notes),
    )


def _duplicate_text(pair: DuplicatePair, cases: Mapping[str, CaseFingerprint]) -> str:
    one, other = (f"{name} ({cases[name].pool})" for name in (pair.first, pair.second))
    what = "have the same voxels" if pair.kind == "identical" else f"look the same (correlation {pair.similarity:.3f})"
    return f"{one} and {other} {what}; where one validates or tests, the other is kept out of training"


@contextlib.contextmanager
def _staging(folder: Path | None) -> Iterator[Path | None]:
    """An empty folder on the disk of `folder`, gone at the end: nothing is left behind where a scan finds errors."""
    if folder is None:
        yield None
        return
    existing = next(parent for parent in Path(folder).absolute().parents if parent.is_dir())
    prefix = f"{PARTIAL}scan-{Path(folder).name}-"
    for left in existing.glob(f"{prefix}*"):  # by a killed scan of this data set, which one process at a time scans
        shutil.rmtree(left, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=prefix, dir=existing) as staging:
        yield Path(staging)


def _publish_foreground(staging: Path, folder: Path, labeled_ids: Sequence[str]) -> None:
    """Moves new foreground intensities to their place and removes those of cases that are no longer labeled."""
    target = Path(folder) / FOLDER
    for path in sorted((staging / FOLDER).glob("*.b2nd")):
        target.mkdir(parents=True, exist_ok=True)
        shutil.move(path, target / path.name)
    expected = {foreground_path(folder, case).name for case in labeled_ids}
    for path in target.glob("*.b2nd"):
        if path.name not in expected:
            path.unlink()
