"""What an experiment takes where the user names nothing: methods and configurations, each with its reason."""

from __future__ import annotations

from autossl.planners.plans import Plans

TWIN = "supervised"
RECOMMENDED_METHODS = ("mean_teacher", "cps")
RECOMMENDED_METHODS_WHY = (
    "two ideas that fail in different ways: agreement with the average of one's own weights (mean_teacher), and of two "
    "networks that started apart (cps). Both take any labels and dimensions, and are what papers compare with; more "
    "methods would mean more choosing among the same few patients, which the verdict has to pay for"
)
ANISOTROPY = 3.0
"""From this ratio of the coarsest to the finest spacing on, slices say little about each other (nnU-Net v2)."""


def recommended_methods(n_unlabeled: int) -> tuple[tuple[str, ...], str]:
    """Methods besides the twin, and why."""
    if n_unlabeled == 0:
        return (), "no unlabeled case, so nothing but the supervised twin can be trained"
    return RECOMMENDED_METHODS, RECOMMENDED_METHODS_WHY


def recommended_configurations(plans: Plans) -> tuple[tuple[str, ...], str]:
    """Configurations, the one that the plan recommends first, and why.

    2D where the plan says so. Else full resolution; with it 2D where the target spacing is anisotropic, because then
    either may win, and low resolution where it is planned, because then a full-resolution patch sees too little.
    """
    recommended = plans.semi_supervised.recommended_configuration
    why = plans.why.get("semi_supervised.recommended_configuration", "the plan's own")
    if recommended == "2d" or "3d_fullres" not in plans.configurations:
        return (recommended,), why
    chosen, reasons = ["3d_fullres"], [why]
    spacing = plans.configuration("3d_fullres").spacing
    ratio = max(spacing) / min(spacing)
    if ratio >= ANISOTROPY and "2d" in plans.configurations:
        chosen.append("2d")
        reasons.append(f"2d besides, because slices are {ratio:.1f} times as far apart as pixels")
    if "3d_lowres" in plans.configurations:
        chosen.append("3d_lowres")
        reasons.append("3d_lowres besides, because a patch of 3d_fullres sees little of an image")
    return tuple(chosen), "; ".join(reasons)
