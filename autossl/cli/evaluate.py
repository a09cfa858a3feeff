"""`autossl_evaluate`: scores a folder of segmentations against references."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from autossl.cli.options import add_workers, add_workspace, label_pair, tolerance
from autossl.cli.progress import CommandProgress
from autossl.cli.run_command import new_parser, run_command

if TYPE_CHECKING:
    from autossl.data.labels import LabelSchema

EPILOG = """\
Per case and class: Dice, IoU, relative volume error, volume difference in mL, 95 % Hausdorff distance (HD95), average
symmetric surface distance (ASSD), normalized surface Dice (NSD); the calibration error where probabilities/ lies in
the folder of predictions. Distances are in mm with the true spacing, in pixels for png, bmp and tif.
A class that is empty in prediction and reference has no value and is left out of the means (and counted). One that is
empty in one of them has no HD95 and ASSD: read these beside the counts.

example: autossl_evaluate --predictions OUT --references labelsTs -d 4 -o summary.json"""


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    return run_command(_parser(), _evaluate, argv)


def _parser() -> argparse.ArgumentParser:
    parser = new_parser("autossl_evaluate", EPILOG)
    parser.add_argument("--predictions", type=Path, required=True, metavar="FOLDER", help="segmentations to score")
    parser.add_argument("--references", type=Path, required=True, metavar="FOLDER", help="label maps of the same cases")
    labels = parser.add_mutually_exclusive_group()
    labels.add_argument("-d", "--dataset", metavar="DATASET", help="dataset whose labels these are (4 or its name)")
    labels.add_argument(
        "--labels",
        type=label_pair,
        nargs="+",
        metavar="NAME=VALUE",
        help="the labels themselves: organ=1 core=2; several values make a region: whole=1,2; ignore=3 is left out",
    )
    parser.add_argument(
        "-o", "--output", type=Path, metavar="FILE", help="default: summary.json in the folder of predictions"
    )
    parser.add_argument(
        "--only_predicted", action="store_true", help="leave out references that have no prediction, and name them"
    )
    surfaces = parser.add_argument_group("surfaces and lesions")
    surfaces.add_argument("--no_surfaces", action="store_true", help="leave out HD95, ASSD and NSD (faster)")
    surfaces.add_argument(
        "--tolerance_mm",
        type=tolerance,
        nargs="+",
        default=[],
        metavar="CLASS=MM",
        help="distance that NSD forgives, per class; the others keep 1 mm (pictures: pixels)",
    )
    surfaces.add_argument(
        "--surface_convention",
        choices=("surface_elements", "border_voxels"),
        default="surface_elements",
        help="border_voxels: as MedPy counts, for comparison with published tables (default: surface_elements)",
    )
    surfaces.add_argument("--lesions", action="store_true", help="also lesion-wise F1, for classes in several pieces")
    add_workers(parser, "read and score")
    add_workspace(parser)
    return parser


def _evaluate(arguments: argparse.Namespace) -> None:
    from autossl.cli.tables import print_evaluation
    from autossl.evaluation.evaluate import EvaluationOptions, evaluate_folder

    output = arguments.output or arguments.predictions / "summary.json"
    schema, remap_references = _labels(arguments)
    with CommandProgress(arguments.quiet) as progress:
        evaluation = evaluate_folder(
            arguments.predictions,
            arguments.references,
            schema,
            EvaluationOptions(
                only_predicted=arguments.only_predicted,
                remap_references=remap_references,
                n_workers=arguments.num_processes,
                surfaces=not arguments.no_surfaces,
                tolerance_mm=dict(arguments.tolerance_mm),
                surface_convention=arguments.surface_convention,
                lesions=arguments.lesions,
            ),
            output=output,
            progress=progress.part("cases"),
        )
    print_evaluation(evaluation)
    print(f"every case: {output}")


def _labels(arguments: argparse.Namespace) -> tuple[LabelSchema, dict[int, int]]:
    """What the values mean, and how those of the references are read (OLD → NEW)."""
    from autossl.evaluation.label_schemas import find_label_schema, labels_of_dataset, schema_of_labels

    if arguments.labels:
        return schema_of_labels(arguments.labels), {}
    if arguments.dataset:
        return labels_of_dataset(arguments.dataset, arguments.workspace)
    return find_label_schema(arguments.predictions, arguments.references), {}
