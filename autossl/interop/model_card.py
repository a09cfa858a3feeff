"""The model card: what a shared model is, what it was made of and what is known about it, as one page of Markdown.

It is made of numbers, names of classes and settings, and sentences that are written here; nothing that could name a
case, a patient or a place on a machine is copied into it unseen.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from statistics import median

from autossl.data.files import read_json
from autossl.data.problems import InvalidInput
from autossl.evaluation.statistics import LEVEL
from autossl.evaluation.verdict import Figure, Verdict
from autossl.inference.inference_plan import InferencePlan
from autossl.inference.model_folder import TrainedModel
from autossl.interop.deployed import is_public, shared_run
from autossl.planners.fingerprint import Fingerprint


@dataclass(frozen=True)
class CardFacts:
    """All that the card is made of."""

    plan: InferencePlan
    """As found, before its folders were renamed."""
    members: Sequence[TrainedModel]
    fingerprint: Fingerprint | None = None
    verdict: Verdict | None = None
    names: Collection[str] = field(default_factory=tuple)
    """Of cases and patients, which must not appear."""


@dataclass(frozen=True)
class PooledScore:
    """Mean Dice of a class over the validation cases of all folds."""

    mean: float
    n_cases: int


def pooled_dice(model: TrainedModel) -> dict[str, PooledScore]:
    """Per class, over the out-of-fold cases of the model's folds; empty where training left no scores."""
    values: dict[str, list[float]] = {}
    for fold in model.folds:
        path = model.folder / f"fold_{fold}" / "validation" / "summary.json"
        try:
            cases = read_json(path).get("cases", {})
        except (InvalidInput, AttributeError):
            continue
        for scores in cases.values():
            for name, metrics in scores.items():
                value = metrics.get("dice")
                if value is not None and math.isfinite(value):
                    values.setdefault(name, []).append(float(value))
    known = {name: values[name] for name in model.schema.foreground if name in values}
    return {name: PooledScore(sum(found) / len(found), len(found)) for name, found in known.items()}


def model_card(facts: CardFacts) -> str:
    """The page."""
    parts = [
        f"# {facts.plan.dataset}: a segmentation model",
        "A research model. Check it on cases of your own, of your scanners and patients, before you rely on it.",
        *_what_it_does(facts),
        "## Did the unlabeled scans help?",
        *_verdict(facts),
        "## How well it does",
        *_scores(facts),
        "## The data it was made from",
        *_data(facts),
        "## How it was made",
        *_making(facts),
        "## How to use it",
        *_use(facts),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _what_it_does(facts: CardFacts) -> list[str]:
    first = facts.members[0]
    classes = ", ".join(f"{name} ({' + '.join(map(str, v))})" for name, v in first.schema.foreground.items())
    channels = ", ".join(f"{number}: {name}" for number, name in first.description.channel_names.items())
    return [
        f"- Segments: {classes}, with these values in the label maps.\n"
        f"- Images: `{first.description.file_ending}`, channels {channels}, one file each as in nnU-Net's imagesTr "
        f"(`CASE_0000{first.description.file_ending}`), in the same units as below."
    ]


def _verdict(facts: CardFacts) -> list[str]:
    verdict = facts.verdict
    if verdict is None:
        return ["No verdict was made: nothing was compared with a supervised twin."]
    lines = [f"**{verdict.word}**: {_points(verdict)}."]
    lines += [text for text in (verdict.sentence, *verdict.notes) if is_public(text, facts.names)]
    rows = [(name, verdict.per_class[name]) for name in facts.members[0].schema.foreground if name in verdict.per_class]
    return [*lines, "\n".join(f"- {name}: {figure.word}; {_points(figure)}." for name, figure in rows)]


def _points(figure: Figure) -> str:
    patients = f"{figure.n_patients} patients"
    if figure.estimate is None:
        return f"no pair of scores, {patients}"
    text = f"{100 * figure.estimate:+.2f} Dice points with unlabeled scans"
    if figure.low is not None and figure.high is not None:
        text += f" ({LEVEL:.0%} interval {100 * figure.low:+.2f} to {100 * figure.high:+.2f})"
    return f"{text}, {patients}"


def _scores(facts: CardFacts) -> list[str]:
    lines = []
    if facts.plan.dice is not None:
        lines.append(
            f"Mean foreground Dice of the model on out-of-fold cases, before postprocessing: {facts.plan.dice:.3f}."
        )
    for member in facts.members:
        scores = pooled_dice(member)
        if scores:
            rows = "\n".join(f"| {name} | {score.mean:.3f} | {score.n_cases} |" for name, score in scores.items())
            lines.append(f"`{member.folder.name}`, each case by the fold that had not seen it:")
            lines.append(f"| class | mean Dice | cases |\n| --- | ---: | ---: |\n{rows}")
    if not lines:
        return ["Not known: no out-of-fold scores lay beside the weights."]
    notes = []
    if any(len(member.folds) > 1 for member in facts.members):
        notes.append("The folds share training cases, so that their scores are correlated.")
    if facts.plan.dice is not None:
        notes.append("The model was chosen by these scores, which are somewhat too high for that.")
    return [*lines, " ".join(notes)]


def _data(facts: CardFacts) -> list[str]:
    labels, first = facts.plan.labels, facts.members[0]
    seen = f"{labels.n_cases} cases of {labels.n_patients} patients" if labels.n_cases else "not noted"
    folds = [member.run.folds[fold] for member in facts.members for fold in member.folds if fold in member.run.folds]
    unlabeled = str(len({case for fold in folds for case in fold.unlabeled})) if folds else "not noted"
    if all(member.run.method == "supervised" for member in facts.members):
        unlabeled = "none, it was trained with labels alone"
    lines = [f"- Labels seen: {seen}.", f"- Unlabeled scans seen: {unlabeled}."]
    if facts.fingerprint is not None:
        lines += _fingerprint_lines(facts.fingerprint)
    else:
        spacing = " × ".join(f"{v:g}" for v in first.plans.original_median_spacing_after_transp)
        lines.append(f"- Median voxel spacing: {spacing} mm, coarsest axis first.")
    return ["\n".join(lines)]


def _fingerprint_lines(fingerprint: Fingerprint) -> list[str]:
    pools = {name: fingerprint.of_pool(name) for name in ("labeled", "unlabeled", "test")}
    counts = ", ".join(f"{len(cases)} {name}" for name, cases in pools.items() if cases)
    cases = [*pools["labeled"].values(), *pools["unlabeled"].values()]
    lines = [f"- The whole data set: {counts} cases, array axes z, y, x."]
    for title, values in (
        ("Voxel spacing in mm", [case.spacing_zyx_mm for case in cases]),
        ("Image size in voxels", [case.shape_zyx for case in cases]),
    ):
        axes = list(zip(*values, strict=True))
        medians = " × ".join(f"{median(axis):g}" for axis in axes)
        ranges = ", ".join(f"{min(axis):g} to {max(axis):g}" for axis in axes)
        lines.append(f"- {title}: median {medians}; {ranges}.")
    for name in [name for name in fingerprint.labels if name not in ("background", "ignore")]:
        volumes = [
            case.class_voxels[name] * math.prod(case.spacing_zyx_mm) / 1000
            for case in pools["labeled"].values()
            if case.class_voxels.get(name)
        ]
        if volumes:
            lines.append(f"- {name}: in {len(volumes)} labeled cases, median {median(volumes):.3g} mL.")
    for channel, known in fingerprint.foreground_intensity_properties_per_channel.items():
        name = fingerprint.channel_names.get(int(channel), channel)
        span = f"median {known.median:.4g}, mostly {known.percentile_00_5:.4g} to {known.percentile_99_5:.4g}"
        lines.append(f"- Intensity of {name} in the labeled structures: {span}.")
    return lines


def _making(facts: CardFacts) -> list[str]:
    parts = []
    for member in facts.members:
        run = shared_run(member.run, member.run.split)
        versions = ", ".join(f"{name} {version}" for name, version in run.versions.items())
        changed = json.dumps(run.changed_settings, sort_keys=True) if run.changed_settings else "none"
        lines = [
            f"- `{member.folder.name}`, fold {', '.join(member.folds)}",
            f"  - method {run.method}, configuration {run.configuration}, preset {run.preset}, seed {run.seed}",
            f"  - {run.total_steps} steps per fold, patch {' × '.join(map(str, member.plan.patch_size))}, "
            f"spacing {' × '.join(f'{v:g}' for v in member.plan.spacing)} mm",
            f"  - settings that were changed: {changed if is_public(changed, facts.names) else 'left out'}",
            f"  - plans {run.plans_hash}; trained with {versions or 'versions that were not noted'}",
        ]
        parts.append("\n".join(lines))
    plan = facts.plan
    rules = "; ".join(str(rule) for rule in plan.postprocessing) or "none"
    together = "one run predicts" if plan.combine == "single" else "the mean of the runs' probabilities decides"
    parts.append(f"- Together: {together}. Postprocessing: {rules}. Split: {plan.split}.")
    if is_public(plan.why, facts.names):
        parts.append(f"- Why this one: {plan.why}")
    written = plan.written
    versions = ", ".join(f"{name} {version}" for name, version in written.versions.items())
    parts.append(f"- Chosen on {written.date[:10]} by {versions} (commit {written.commit}).")
    return ["\n".join(parts)]


def _use(facts: CardFacts) -> list[str]:
    first = facts.members[0]
    lines = [
        "```",
        "autossl_install_model THIS_FILE.zip",
        f"autossl_predict -i IMAGES -o SEGMENTATIONS -d {facts.plan.dataset}",
        "```",
    ]
    parts = ["\n".join(lines), "Installing prints the folder, which `autossl_predict --model FOLDER` takes as well."]
    alone = [sorted(found) for found in first.separate_modalities()] if first.description.n_channels > 1 else []
    if alone:
        parts.append(f"From one modality alone, with --modality: {first.description.channels.listed(alone)}.")
    return parts
