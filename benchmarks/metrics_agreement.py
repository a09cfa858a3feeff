"""Compares our surface metrics with MedPy's and DeepMind's surface-distance on real predictions.

    python benchmarks/metrics_agreement.py --predictions FOLDER --references FOLDER --labels Anterior=1 Posterior=2
        [--cases 20] [--spacing 3 1 0.5] [-o benchmarks/results/metrics_agreement_hippocampus.json]

The first cases by name are scored in both of our conventions (see autossl/evaluation/surfaces.py):

- `surface_elements` against surface-distance: NSD, HD95, Dice as they are; ASSD against its two directed means,
  weighted by the two surfaces' areas, because it gives no symmetric one.
- `border_voxels` against MedPy: hd95, assd, dc, jc and ravd as they are.

`largest_difference` is over cases and classes and should be rounding. `between_conventions` is what the same label maps
differ by when the other convention is used: border voxels count alike whatever surface they stand for, lie half a voxel
inside, and MedPy takes one percentile over both directions. Neither is wrong; tables compare only within one of them.
Each case is scored with its own spacing, and with --spacing once more as if its voxels had those edges, because the
hippocampus cases are sampled evenly. Pairs with an empty mask are left out (both packages stop or give infinity).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import surface_distance
from medpy.metric import binary

from autossl.cli.options import label_pair
from autossl.data.files import write_json
from autossl.data.image_io import read_label
from autossl.data.labels import LabelSchema
from autossl.data.provenance import Written
from autossl.evaluation.case_scores import Scoring, Voxel, score_all
from autossl.evaluation.evaluate import label_files
from autossl.evaluation.label_schemas import schema_of_labels
from autossl.evaluation.surfaces import DEFAULT_TOLERANCE, Convention

Figures = dict[str, float]
THEIRS = {"surface_elements": "surface-distance", "border_voxels": "medpy"}


def main() -> None:
    """Parses, compares, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--predictions", type=Path, required=True)
    parser.add_argument("--references", type=Path, required=True)
    parser.add_argument("--labels", type=label_pair, nargs="+", required=True)
    parser.add_argument("--cases", type=int, default=20)
    parser.add_argument("--spacing", type=float, nargs=3, help="z y x in mm, beside the cases' own")
    parser.add_argument("-o", "--output", type=Path, default=Path("benchmarks/results/metrics_agreement.json"))
    arguments = parser.parse_args()
    predicted, referenced = label_files(arguments.predictions), label_files(arguments.references)
    cases = sorted(set(predicted) & set(referenced))[: arguments.cases]
    schema = schema_of_labels(arguments.labels)
    content: dict[str, Any] = {
        "written": Written.now().model_dump() | {name: version(name) for name in THEIRS.values()},
        "predictions": str(Path(*arguments.predictions.parts[-5:])),
        "n_cases": len(cases),
        "classes": list(schema.foreground),
        "cases": cases,
    }
    for name, spacing in {"own_spacing": None, "made_up_spacing": arguments.spacing}.items():
        if name == "made_up_spacing" and spacing is None:
            continue
        compared = [p for case in cases for p in _pairs(predicted[case], referenced[case], schema, spacing)]
        content[name] = {"spacing_zyx_mm": spacing or "of each case", "n_pairs": len(compared), **_summary(compared)}
    write_json(arguments.output, content)
    print(json.dumps({key: value for key, value in content.items() if key != "cases"}, indent=2))


def _pairs(
    prediction_file: Path, reference_file: Path, schema: LabelSchema, made_up: Sequence[float] | None
) -> Iterator[dict[str, Figures]]:
    """Figures of a case's classes, by convention and package."""
    prediction, _, _ = read_label(prediction_file, "native")
    reference, spacing, _ = read_label(reference_file, "native")
    if made_up is not None:
        spacing = (made_up[0], made_up[1], made_up[2])
    voxel = Voxel(spacing, float(np.prod(spacing)))
    conventions: tuple[Convention, ...] = ("surface_elements", "border_voxels")
    ours = {c: score_all(prediction, reference, schema, voxel, Scoring(surface_convention=c)) for c in conventions}
    for name, mask in schema.class_masks(prediction).items():
        true = schema.class_masks(reference)[name]
        if mask.any() and true.any():
            yield {
                **{convention: dict(ours[convention][name].metrics) for convention in conventions},
                "surface-distance": _by_surface_distance(mask, true, spacing),
                "medpy": _by_medpy(mask, true, spacing),
            }


def _by_surface_distance(mask: np.ndarray, true: np.ndarray, spacing: Sequence[float]) -> Figures:
    found = surface_distance.compute_surface_distances(true, mask, spacing)
    areas = [found[name].sum() for name in ("surfel_areas_gt", "surfel_areas_pred")]
    return {
        "nsd": float(surface_distance.compute_surface_dice_at_tolerance(found, DEFAULT_TOLERANCE)),
        "hd95_mm": float(surface_distance.compute_robust_hausdorff(found, 95)),
        "assd_mm": float(np.average(surface_distance.compute_average_surface_distance(found), weights=areas)),
        "dice": float(surface_distance.compute_dice_coefficient(true, mask)),
    }


def _by_medpy(mask: np.ndarray, true: np.ndarray, spacing: Sequence[float]) -> Figures:
    return {
        "hd95_mm": float(binary.hd95(mask, true, spacing)),
        "assd_mm": float(binary.assd(mask, true, spacing)),
        "dice": float(binary.dc(mask, true)),
        "iou": float(binary.jc(mask, true)),
        "volume_error_relative": float(binary.ravd(mask, true)),
    }


def _summary(pairs: Sequence[dict[str, Figures]]) -> dict[str, Any]:
    """Largest differences to each package, and means and largest differences between the conventions."""
    largest = {
        f"{convention} against {package}": {
            metric: max(abs(pair[convention][metric] - pair[package][metric]) for pair in pairs)
            for metric in pairs[0][package]
        }
        for convention, package in THEIRS.items()
    }
    between = {
        metric: {
            **{convention: float(np.mean([pair[convention][metric] for pair in pairs])) for convention in THEIRS},
            "largest_difference": max(
                abs(pair["surface_elements"][metric] - pair["border_voxels"][metric]) for pair in pairs
            ),
        }
        for metric in ("hd95_mm", "assd_mm", "nsd")
    }
    return {"largest_difference": largest, "between_conventions": between}


if __name__ == "__main__":
    main()
