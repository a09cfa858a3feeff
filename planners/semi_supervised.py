"""What the unlabeled cases and the small number of labels ask for, each decision with the numbers it was made from."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from autossl.planners.configurations import Sizes
from autossl.planners.facts import DatasetFacts
from autossl.planners.plans import SemiSupervisedPlan
from autossl.planners.presets import Preset

STEPS_PER_PATIENT = 2500
STEP_RANGE = (50_000, 250_000)
"""250 000 is nnU-Net v2's length of a run; published semi-supervised runs take 6 000 to 30 000."""
WARM_UP_FRACTION = 0.02
RAMP_END_FRACTION = 1.0
EMA_RANGE = (0.99, 0.999)
EMA_WINDOWS = 300
"""The teacher averages over the last T / 300 steps."""
LEFT_RIGHT_AXIS = 2
"""Array axis x: left to right in RAS+ volumes, and in pictures as they are looked at."""
FEW_LABELED_PATIENTS = 10
METHODS_FOR_FEW = ("fixmatch", "unimatch", "mean_teacher", "self_training")
METHODS_FOR_MANY = ("self_training", "fixmatch", "unimatch", "mean_teacher")
WITHOUT_UNLABELED = "supervised"
NOT_MEASURED = "the shapes of the classes were not measured"
SIDES = {"left": "right", "lt": "rt", "lh": "rh", "l": "r"}

Why = dict[str, str]


def total_steps(preset: Preset, n_labeled_patients: int) -> tuple[int, str]:
    """Training steps of a run over all its phases, and why."""
    if preset.total_steps is not None:
        return preset.total_steps, f"fixed for preset {preset.name}"
    low, high = STEP_RANGE
    steps = min(max(STEPS_PER_PATIENT * n_labeled_patients, low), high)
    return steps, (
        f"{STEPS_PER_PATIENT} × {n_labeled_patients} labeled patients = {STEPS_PER_PATIENT * n_labeled_patients:,}, "
        f"kept within {low:,} to {high:,}"
    )


def ema_decay_max(steps: int) -> float:
    """Decay of the teacher's moving average, clip(1 - 300/T, 0.99, 0.999)."""
    return min(max(1 - EMA_WINDOWS / steps, EMA_RANGE[0]), EMA_RANGE[1])


def left_right_pairs(names: Iterable[str]) -> list[tuple[str, str]]:
    """Pairs of class names that differ in their side only, such as kidney_left and kidney_right."""
    by_rest: dict[tuple[str, ...], dict[str, str]] = {}
    for name in names:
        side, rest = _side_and_rest(name)
        if side:
            by_rest.setdefault((SIDES.get(side, side), *rest), {})[side] = name
    return [
        (found[left], found[right])
        for found in by_rest.values()
        for left, right in SIDES.items()
        if left in found and right in found
    ]


def mirror_axes(
    dims: int, transpose_forward: Sequence[int], pairs: Sequence[tuple[str, str]]
) -> tuple[tuple[int, ...], str]:
    """Axes of the patch that may be mirrored, in transposed order, and why.

    Args:
        dims: Spatial dimensions of the patch; in 2d the first transposed axis is the slice axis.
        transpose_forward: Original axis (z,y,x) of each transposed one.
        pairs: Class names that differ in their side only.
    """
    original = list(transpose_forward)[3 - dims :]
    if not pairs:
        return tuple(range(dims)), "no two class names differ in left and right only: all axes"
    kept = tuple(axis for axis, source in enumerate(original) if source != LEFT_RIGHT_AXIS)
    named = ", ".join(f"{left} / {right}" for left, right in pairs[:3]) + (" …" if len(pairs) > 3 else "")
    if len(kept) == dims:
        return kept, f"{len(pairs)} pairs of sides ({named}), but left-right is the slice axis: all axes in plane"
    off = next(axis for axis, source in enumerate(original) if source == LEFT_RIGHT_AXIS)
    return kept, (
        f"{len(pairs)} pair{'s' if len(pairs) > 1 else ''} of sides ({named}): a mirrored left looks like a right, "
        f"so the left-right axis {off} is not mirrored"
    )


def recommend_configuration(sizes: Mapping[str, Sizes]) -> tuple[str, str]:
    """The configuration to begin with, by what the networks can see."""
    if "3d_fullres" not in sizes:
        return "2d", "no case has more than one slice"
    full = sizes["3d_fullres"]
    slices = full.topology.patch_size[0]
    if full.topology.divisors[0] == 1:
        return "2d", f"the 3d network never pools its slice axis ({slices} slices): it sees little more than a slice"
    covered = f"a 3d patch sees {slices} slices and {min(full.share_of_median, 1):.0%} of the median image"
    if "3d_lowres" in sizes:
        return "3d_fullres", f"{covered}; 3d_lowres is planned too, compare both by cross-validation"
    return "3d_fullres", covered


def recommend_method(n_labeled_patients: int, n_unlabeled: int) -> tuple[str, str]:
    """The first method in the order that the evidence suggests, and why.

    One-pass methods gained most below about 10 labeled patients (ACDC: +6.6 Dice at 3, +3.7 at 7, nnFilterMatch);
    above, rounds of filtered pseudo-labels won challenges (FLARE22, ToothFairy).
    """
    if n_unlabeled == 0:
        return WITHOUT_UNLABELED, "no unlabeled case"
    few = n_labeled_patients < FEW_LABELED_PATIENTS
    order = METHODS_FOR_FEW if few else METHODS_FOR_MANY
    threshold = f"{'below' if few else 'at least'} {FEW_LABELED_PATIENTS}"
    counts = f"{n_labeled_patients} labeled patients ({threshold}), {n_unlabeled} unlabeled cases"
    return order[0], f"{counts}: the first to try of {', '.join(order)}"


@dataclass(frozen=True)
class Decided:
    """The plan's semi-supervised part and its reasons by dotted path."""

    plan: SemiSupervisedPlan
    why: Why


def decide(facts: DatasetFacts, preset: Preset, sizes: Mapping[str, Sizes]) -> Decided:
    """All semi-supervised decisions of a plan.

    Args:
        facts: The data set.
        preset: How networks are sized.
        sizes: By name of the configuration.
    """
    steps, steps_why = total_steps(preset, facts.n_labeled_patients)
    decay = ema_decay_max(steps)
    statistics = facts.statistics
    classes = statistics.classes if statistics else {}
    single_why = "; ".join(f"{name}: {found.single_component_why}" for name, found in classes.items())
    elliptic_why = "; ".join(f"{name}: {found.elliptic_why}" for name, found in classes.items())
    configuration, configuration_why = recommend_configuration(sizes)
    method, method_why = recommend_method(facts.n_labeled_patients, facts.n_unlabeled)
    plan = SemiSupervisedPlan(
        total_steps=steps,
        warm_up_fraction=WARM_UP_FRACTION,
        ramp_end_fraction=RAMP_END_FRACTION,
        ema_decay_max=decay,
        single_component_classes=statistics.single_component_classes if statistics else (),
        elliptic_classes=statistics.elliptic_classes if statistics else (),
        recommended_configuration=configuration,
        recommended_method=method,
    )
    why = {
        "total_steps": steps_why,
        "warm_up_fraction": (
            f"terms built on hard pseudo-labels wait {WARM_UP_FRACTION:.0%} of the run = "
            f"{round(WARM_UP_FRACTION * steps)} steps, until the network predicts more than background"
        ),
        "ramp_end_fraction": (
            f"weights of unlabeled terms grow until {RAMP_END_FRACTION:.0%} of the run = "
            f"{round(RAMP_END_FRACTION * steps)} steps, as in mean teacher's benchmarks"
        ),
        "ema_decay_max": (
            f"clip(1 - {EMA_WINDOWS}/{steps}, {EMA_RANGE[0]}, {EMA_RANGE[1]}): the teacher averages the last "
            f"{round(1 / (1 - decay))} steps"
        ),
        "single_component_classes": single_why or NOT_MEASURED,
        "elliptic_classes": elliptic_why or NOT_MEASURED,
        "recommended_configuration": configuration_why,
        "recommended_method": method_why,
    }
    return Decided(plan, {f"semi_supervised.{key}": text for key, text in why.items()})


def batch_reasons(batch_size: int, n_unlabeled: int) -> Why:
    """Why the labeled and the unlabeled part of a batch are as large as they are, by field name."""
    unlabeled = "the labeled part's size, whatever the size of the pool, so that noise cannot drown the labels"
    return {
        "labeled_batch_size": f"the preset's batch of {batch_size}, the same as in a supervised run",
        "unlabeled_batch_size": unlabeled
        if n_unlabeled
        else f"{unlabeled}; used where a budget (--labeled) hides labels",
    }


def _side_and_rest(name: str) -> tuple[str, tuple[str, ...]]:
    """("left", ("kidney",)) for left_kidney, KidneyLeft, kidney-L …; ("", …) without a side."""
    words = [word.lower() for word in re.findall(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])|\d+", name)]
    sides = {*SIDES, *SIDES.values()}
    found = [word for word in words if word in sides]
    if len(found) == 1:
        words.remove(found[0])
        return found[0], tuple(sorted(words))
    for side in ("left", "right"):
        if not found and side in name.lower():
            return side, (re.sub(r"[^a-z0-9]", "", name.lower().replace(side, "", 1)),)
    return "", tuple(words)
