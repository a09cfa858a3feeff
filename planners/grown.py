"""Plans of a data set that only got more labels: what is preprocessed and trained stays valid.

Labeled cases decide spacing, patch and normalization, so ten more of them move the medians a little, and planning anew
would preprocess every case again and make networks that earlier weights may not fit. Where the only change is that
labels were added, the sizes stay; what new labels tell about steps, shapes and methods is taken over. A small file
beside the plans, their basis, remembers which cases they were made from.
"""

from __future__ import annotations

import logging
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from autossl.data.files import content_hash, read_json, write_json
from autossl.data.problems import InvalidInput
from autossl.planners.fingerprint import Fingerprint
from autossl.planners.plan_experiment import PlanOptions
from autossl.planners.plans import Plans
from autossl.version import __version__

logger = logging.getLogger(__name__)

SEMI_SUPERVISED = "semi_supervised"
MAX_NAMED = 6


class PlanBasis(BaseModel):
    """From what plans were made."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    plans_hash: str
    """Of the plans as they were written; plans that were edited by hand have another."""
    terms: str
    """Hash of what the data set declares, of the options and of this program's version."""
    labeled: dict[str, str]
    """Case → hash of its voxels and class sizes."""
    before: PlanBasis | None = None
    """Of the plans that were replaced last. It is written before the plans: a kill between the two leaves those."""

    def of(self, plans: Plans) -> PlanBasis:
        """The basis of the plans that are there: this one, or the one before where only that fits."""
        fits_before = self.before is not None and self.before.plans_hash == plans.hash() != self.plans_hash
        return self.before if fits_before and self.before is not None else self


def plan_basis(plans: Plans, fingerprint: Fingerprint, options: PlanOptions) -> PlanBasis:
    """Of plans that are made now."""
    terms = {
        "labels": {name: list(values) for name, values in fingerprint.labels.items()},
        "channels": {str(number): name for number, name in fingerprint.channel_names.items()},
        "remap": {str(old): new for old, new in fingerprint.remap_labels.items()},
        "orientation": fingerprint.orientation,
        "preset": options.preset,
        "gpu_memory_gb": options.gpu_memory_gb,
        "spacing": None if options.overwrite_target_spacing is None else list(options.overwrite_target_spacing),
        "version": __version__,
    }
    labeled = fingerprint.of_pool("labeled")
    return PlanBasis(
        plans_hash=plans.hash(),
        terms=content_hash(terms),
        labeled={name: content_hash([case.voxel_hash, case.class_voxels]) for name, case in labeled.items()},
    )


def keep_sizes(fresh: Plans, now: PlanBasis, old: Plans, basis: PlanBasis) -> Plans | None:
    """The old plans with the new semi-supervised decisions, where labels were added and nothing else changed.

    Args:
        fresh: as planned now.
        now: the basis of `fresh`.
        old: as they lie on disk.
        basis: of `old`.

    Returns:
        None where the fresh plans hold: nothing was added, a case changed or left, options or declarations changed, or
        the old plans were edited.
    """
    before = basis.labeled.items()
    if basis.plans_hash != old.hash() or basis.terms != now.terms or not before < now.labeled.items():
        return None
    semi = fresh.semi_supervised
    if semi.recommended_configuration not in old.configurations:
        kept = old.semi_supervised.recommended_configuration
        semi = semi.model_copy(update={"recommended_configuration": kept})
    reasons = {key: text for key, text in old.why.items() if not key.startswith(f"{SEMI_SUPERVISED}.")}
    reasons |= {key: text for key, text in fresh.why.items() if key.startswith(f"{SEMI_SUPERVISED}.")}
    reasons["configurations"] = (
        f"sizes and normalization are those planned with {len(basis.labeled)} labeled cases (now {len(now.labeled)}), "
        "so that preprocessed cases and trained weights stay valid; --replan makes them anew"
    )
    return old.model_copy(update={SEMI_SUPERVISED: semi, "why": reasons})


def basis_file(plans_path: Path) -> Path:
    """Beside plans_PRESET.json."""
    return plans_path.with_name(f"basis_of_{plans_path.name}")


def read_basis(plans_path: Path) -> PlanBasis | None:
    """None where there is none that can be used."""
    try:
        return PlanBasis.model_validate(read_json(basis_file(plans_path)))
    except (InvalidInput, ValidationError):
        return None


def write_basis(plans_path: Path, basis: PlanBasis) -> None:
    """Writes it atomically, with what was there before where that is another; call it before the plans are written."""
    there = read_basis(plans_path)
    if there is not None:
        before = there.before if there.plans_hash == basis.plans_hash else there.model_copy(update={"before": None})
        basis = basis.model_copy(update={"before": before})
    write_json(basis_file(plans_path), basis.model_dump(mode="json"))


def log_kept(plans: Plans, differences: list[str]) -> None:
    """Says what was kept, and what planning anew would change."""
    named = ", ".join(differences[:MAX_NAMED]) + (
        f" and {len(differences) - MAX_NAMED} more" if len(differences) > MAX_NAMED else ""
    )
    logger.info("%s: %s", plans.preset, plans.why["configurations"])
    if differences:
        logger.warning(
            "%s: labels were added and the plan's sizes stay as they were. Planning anew would change %s: all cases "
            "are then preprocessed again, and earlier weights may not fit. Ask for it with --replan",
            plans.dataset_name,
            named,
        )
