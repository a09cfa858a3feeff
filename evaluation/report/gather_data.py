"""What the page says of the data, the plan, and how to repeat everything."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from autossl.data.runs import FoundRun
from autossl.evaluation.report.model import (
    DataPart,
    Decision,
    Listed,
    PlanPart,
    PoolRow,
    RepeatPart,
    RunRecord,
    Scores,
)
from autossl.evaluation.report.place import EXPERIMENT, RESULT_FILES, Place
from autossl.evaluation.report.sources import COMPUTED, Form, Traced, pointer
from autossl.planners.case_scan import QUANTILES
from autossl.planners.domain_shift import domain_shift_notes
from autossl.planners.fingerprint import Fingerprint, read_fingerprint
from autossl.planners.plan_and_preprocess import FINGERPRINT

POOLS = ("labeled", "unlabeled", "test")
MEDIAN = QUANTILES.index(0.5)
LISTED = 40
"""Lines of a list that the page shows; the count is of all."""
WHERE_LABELED = "imagesTr/"
SHOWN_DECISIONS = (
    "patch_size",
    "spacing",
    "median_image_size_in_voxels",
    "batch_size",
    "labeled_batch_size",
    "unlabeled_batch_size",
    "architecture.network_class_name",
    "architecture.arch_kwargs.features_per_stage",
    "architecture.arch_kwargs.strides",
    "normalization_schemes",
    "batch_dice",
    "mirror_axes",
    "learning_rate",
)
"""Those of a configuration that come first; all others with a reason follow."""


# --------------------------------------------------------------------------------------------------------------- data


def gather_data(place: Place) -> DataPart | None:
    """fingerprint.json, and the split's lists."""
    source = place.preprocessed(FINGERPRINT)
    if not place.files.has(source):
        return None
    fingerprint = read_fingerprint(place.files.root / source)
    split = place.preprocessed(f"splits/{place.split}.json")
    pools = [pool for pool in POOLS if fingerprint.of_pool(pool)]  # type: ignore[arg-type]
    return DataPart(
        channels=tuple(fingerprint.channel_names.values()),
        classes=tuple(name for name in fingerprint.labels if name not in ("background", "ignore")),
        split_counts=_split_counts(place, split),
        pools=tuple(_pool_row(place, source, pool) for pool in pools),
        volumes=_volumes(place, source),
        shift=_shift(place, fingerprint, split),
        duplicates=_duplicates(place, source),
        excluded=_excluded(place, split),
        without_label=_without_label(fingerprint, source),
        warnings=_warnings(place, source),
        intensities=_intensities(place, fingerprint, split),
        source=source,
    )


def _split_counts(place: Place, split: str) -> tuple[tuple[str, Traced], ...]:
    if not place.files.has(split):
        return ()
    named = (
        ("labeled, in folds", "count /assigned/*"),
        ("unlabeled", "count /all/unlabeled/*"),
        ("hidden test", "count /hidden_test/*"),
        ("kept out, would leak", "count /all/excluded/*"),
        ("folds", "count /folds/*"),
    )
    return tuple((name, place.files.traced(split, key, "count")) for name, key in named)


def _pool_row(place: Place, source: str, pool: str) -> PoolRow:
    def axes(field: str, form: Form) -> tuple[tuple[Traced, Traced, Traced], ...]:
        def of(word: str, axis: int) -> Traced:
            return place.files.traced(source, f"{word} /cases/[pool={pool}]/{field}/{axis}", form)

        return tuple((of("min", axis), of("median", axis), of("max", axis)) for axis in range(3))

    return PoolRow(
        name=pool,
        n_cases=place.files.traced(source, f"count /cases/[pool={pool}]", "count"),
        spacing=axes("spacing_zyx_mm", "plain"),
        shape=axes("shape_zyx", "whole"),
    )


def _volumes(place: Place, source: str) -> dict[str, tuple[Traced, Traced, Traced, Traced]]:
    names = dict.fromkeys(
        name for case in place.files.content(source)["cases"].values() for name in case.get("class_voxels", {})
    )

    def of(word: str, name: str) -> Traced:
        return place.files.traced(source, f"{word} /cases/*/class_voxels{pointer(name)}", "count")

    return {name: (of("count", name), of("min", name), of("median", name), of("max", name)) for name in names}


def _shift(place: Place, fingerprint: Fingerprint, split: str) -> Listed:
    """Of the split's unlabeled cases against its labeled ones; as the fingerprint says where there is no split."""
    if not place.files.has(split):
        notes, source = list(fingerprint.domain_shift), place.preprocessed(FINGERPRINT)
    else:
        labeled, unlabeled = _pools_of_split(place, fingerprint, split)
        notes = domain_shift_notes(list(labeled.values()), list(unlabeled.values()), fingerprint.channel_names)
        source = split
    return _computed(source, "domain shift", [("", note) for note in notes])


def _pools_of_split(place: Place, fingerprint: Fingerprint, split: str) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """Case → its fingerprint: those with labels in the split, those without."""
    names = (place.files.get(split, "assigned") or {}, place.files.get(split, "all", "unlabeled") or ())
    labeled, unlabeled = ({case: fingerprint.cases[case] for case in own if case in fingerprint.cases} for own in names)
    return labeled, unlabeled


def _duplicates(place: Place, source: str) -> Listed:
    pairs = place.files.get(source, "duplicates") or ()
    return Listed(
        place.files.traced(source, "count /duplicates/*", "count"),
        tuple(
            (f"{pair['first']} and {pair['second']}", place.files.traced(source, f"/duplicates/{number}/kind", "text"))
            for number, pair in enumerate(pairs[:LISTED])
        ),
    )


def _excluded(place: Place, split: str) -> Listed:
    """Of all folds together."""
    lines: dict[str, Traced] = {}
    for number, fold in enumerate(place.files.get(split, "folds") or ()):
        for case in fold["excluded"]:
            lines.setdefault(case, place.files.traced(split, pointer("folds", number, "excluded", case), "text"))
    count = Traced(len(lines), split, f"{COMPUTED}cases that some fold keeps out", "count")
    return Listed(count, tuple(lines.items())[:LISTED])


def _without_label(fingerprint: Fingerprint, source: str) -> Listed:
    """Cases of imagesTr that have no label file."""
    names = [
        name
        for name, case in fingerprint.cases.items()
        if case.pool == "unlabeled" and any(file.startswith(WHERE_LABELED) for file in case.files)
    ]
    return _computed(source, "cases of imagesTr without a label file", [(name, "no label file") for name in names])


def _warnings(place: Place, source: str) -> Listed:
    found = [
        (case, place.files.traced(source, pointer("cases", case, "warnings", number), "text"))
        for case, content in place.files.content(source)["cases"].items()
        for number in range(len(content.get("warnings", ())))
    ]
    return Listed(place.files.traced(source, "count /cases/*/warnings/*", "count"), tuple(found[:LISTED]))


def _computed(source: str, what: str, lines: Sequence[tuple[str, str]]) -> Listed:
    return Listed(
        Traced(len(lines), source, f"{COMPUTED}number of {what}", "count"),
        tuple(
            (name, Traced(text, source, f"{COMPUTED}{what}, {number}", "text"))
            for number, (name, text) in enumerate(lines[:LISTED])
        ),
    )


def _intensities(place: Place, fingerprint: Fingerprint, split: str) -> dict[str, Scores]:
    """Channel → pool → the median intensity of each case."""
    if place.files.has(split):
        labeled, unlabeled = _pools_of_split(place, fingerprint, split)
    else:
        labeled, unlabeled = fingerprint.of_pool("labeled"), fingerprint.of_pool("unlabeled")
    pools = {"labeled": labeled, "unlabeled": unlabeled}
    return {
        name: {
            pool: tuple(case.intensity_quantiles[channel][MEDIAN] for case in cases.values())
            for pool, cases in pools.items()
            if cases
        }
        for channel, name in fingerprint.channel_names.items()
    }


# --------------------------------------------------------------------------------------------------------------- plan


def gather_plan(place: Place) -> PlanPart | None:
    """Of the preset that the runs use; without runs the only one there is."""
    presets = sorted({run.spec.preset for run in place.runs})
    there = place.files.find(place.preprocessed("plans_*.json"))
    wanted = [place.preprocessed(f"plans_{preset}.json") for preset in presets] or there
    source = next((file for file in wanted if file in there), None)
    if source is None:
        return None
    used = {run.spec.configuration for run in place.runs}
    content = place.files.content(source)
    whys = content.get("why", {})
    groups: dict[str, list[Decision]] = {}
    for name in content["configurations"]:
        if used and name not in used:
            continue
        own = [key for key in whys if key.startswith(f"configurations.{name}.")]
        own.sort(key=lambda key: _rank(key.removeprefix(f"configurations.{name}.")))
        groups[name] = [_decision(place, source, content, key, f"configurations.{name}.") for key in own]
    rest = [key for key in whys if not key.startswith("configurations.")]
    groups["all configurations"] = [_decision(place, source, content, key, "") for key in rest]
    return PlanPart(
        preset=str(content["preset"]), source=source, groups={name: tuple(own) for name, own in groups.items() if own}
    )


def _rank(name: str) -> int:
    return SHOWN_DECISIONS.index(name) if name in SHOWN_DECISIONS else len(SHOWN_DECISIONS)


def _decision(place: Place, source: str, content: Mapping[str, Any], key: str, prefix: str) -> Decision:
    found: Any = content
    for part in key.split("."):
        found = found.get(part) if isinstance(found, dict) else None
    value = Traced(_compact(found), source, f"{COMPUTED}{key}", "text")
    name = key.removeprefix(prefix).replace("architecture.arch_kwargs.", "").replace("architecture.", "")
    return Decision(name.replace("_", " "), value, place.files.traced(source, pointer("why", key), "text"))


def _compact(value: Any) -> str:
    """A decision on one line."""
    if value is None:
        return "–"
    if isinstance(value, str):
        return value.rsplit(".", 1)[-1]
    if isinstance(value, list):
        depth = isinstance(value[0], list) if value else False
        return ", ".join(_compact(part) for part in value) if depth else " × ".join(_compact(part) for part in value)
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:g}" if isinstance(value, int | float) else json.dumps(value)


# ------------------------------------------------------------------------------------------------------------- repeat


def gather_repeat(place: Place) -> RepeatPart:
    """Commands, seeds and versions."""
    experiment = place.result(EXPERIMENT)
    files, written = place.files, []
    for name in RESULT_FILES:
        source = place.result(name)
        if files.get(source, "written"):
            date, commit, version = (
                files.traced(source, f"/written/{key}", "text") for key in ("date", "commit", "versions/autossl")
            )
            written.append((name, date, commit, version))
    whys = files.get(experiment, "why") or {}
    return RepeatPart(
        command=files.traced(experiment, "/command", "text") if files.has(experiment) else None,
        why={name: files.traced(experiment, pointer("why", name), "text") for name in whys},
        runs=tuple(_record(place, run) for run in place.runs),
        written=tuple(written),
    )


def _record(place: Place, run: FoundRun) -> RunRecord:
    source = place.of_run(run, "run.json")

    def of(*parts: str, form: Form = "text") -> Traced:
        return place.files.traced(source, pointer(*parts), form)

    versions = ", ".join(f"{name} {version}" for name, version in run.spec.versions.items())
    return RunRecord(
        name=place.named(run.folder.name),
        folder=place.files.relative(run.folder),
        seed=of("seed", form="whole"),
        steps=of("total_steps", form="count"),
        plans_hash=of("plans_hash"),
        device=of("device"),
        threads=of("threads", form="whole"),
        versions=Traced(versions, source, f"{COMPUTED}versions", "text"),
        settings=", ".join(f"{key}={value}" for key, value in run.spec.changed_settings.items()),
        command=_command(place, run),
    )


def _command(place: Place, run: FoundRun) -> Traced | None:
    """As experiment.json has it."""
    experiment = place.result(EXPERIMENT)
    for number, entry in enumerate(place.files.get(experiment, "runs") or ()):
        if str(entry["run"]).rsplit("/", 1)[-1] == run.folder.name:
            return place.files.traced(experiment, f"/runs/{number}/command", "text")
    return None
