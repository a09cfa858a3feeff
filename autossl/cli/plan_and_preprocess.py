"""`autossl_plan_and_preprocess`: measures a dataset, plans it, and preprocesses its cases."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING

from autossl.cli.options import add_workers, add_workspace, positive_real
from autossl.cli.progress import CommandProgress
from autossl.cli.run_command import new_parser, run_command

if TYPE_CHECKING:
    from autossl.planners.plan_and_preprocess import PlanRequest, PlanResult

EPILOG = """\
Writes fingerprint.json, plans_PRESET.json (every decision with its why) and data/ below preprocessed/DATASET.
Run it again after adding cases: what is finished is not done again. After adding labels the plan's sizes stay, so that
preprocessed cases and trained weights stay valid.

example: autossl_plan_and_preprocess -d 4 --preset nano"""


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    return run_command(_parser(), _plan, argv)


def _parser() -> argparse.ArgumentParser:
    parser = new_parser("autossl_plan_and_preprocess", EPILOG)
    parser.add_argument("-d", "--dataset", required=True, metavar="DATASET", help="4, 004, Name or Dataset004_Name")
    parser.add_argument(
        "-c",
        "--configurations",
        nargs="+",
        metavar="C",
        help="preprocess for these only: 2d 3d_fullres 3d_lowres (default: all that are planned)",
    )
    parser.add_argument(
        "--preset", default="plain", metavar="P", help="plain, resenc_m, resenc_l, resenc_xl or nano (default: plain)"
    )
    parser.add_argument("--no_preprocessing", action="store_true", help="write the plans and stop")
    parser.add_argument(
        "--gpu_memory_gb", type=positive_real, metavar="G", help="plan for so much memory (default: the preset's own)"
    )
    parser.add_argument(
        "--overwrite_target_spacing",
        type=positive_real,
        nargs=3,
        metavar=("Z", "Y", "X"),
        help="spacing in mm to resample to, in the axis order of the images",
    )
    parser.add_argument(
        "--verify_dataset_integrity",
        action="store_true",
        help="check every voxel of images and labels as well (the cheap checks always run)",
    )
    parser.add_argument(
        "--remap_labels",
        nargs="+",
        default=[],
        metavar="OLD=NEW",
        help="read these label values as others; the raw files stay as they are",
    )
    parser.add_argument(
        "--replan",
        action="store_true",
        help="after labels were added, plan sizes and normalization anew (preprocesses all cases again)",
    )
    add_workers(parser, "read and preprocess cases")
    add_workspace(parser)
    return parser


def _plan(arguments: argparse.Namespace) -> None:
    from autossl.planners.plan_and_preprocess import plan_and_preprocess

    with CommandProgress(arguments.quiet) as progress:
        result = plan_and_preprocess(
            _request(arguments), lambda stage, case, done, total: progress.update(stage, done, total)
        )
    _print_result(result)


def _request(arguments: argparse.Namespace) -> PlanRequest:
    from autossl.planners.plan_and_preprocess import PlanRequest
    from autossl.planners.plan_experiment import PlanOptions

    spacing, configurations = arguments.overwrite_target_spacing, arguments.configurations
    return PlanRequest(
        dataset=arguments.dataset,
        workspace=arguments.workspace,
        options=PlanOptions(
            preset=arguments.preset,
            gpu_memory_gb=arguments.gpu_memory_gb,
            overwrite_target_spacing=tuple(spacing) if spacing else None,
            configurations=tuple(configurations) if configurations else None,
        ),
        preprocess=not arguments.no_preprocessing,
        n_workers=arguments.num_processes,
        verify_dataset_integrity=arguments.verify_dataset_integrity,
        remap_labels=tuple(arguments.remap_labels),
        replan=arguments.replan,
    )


def _print_result(result: PlanResult) -> None:
    from autossl.cli.tables import print_table

    pools = ", ".join(f"{len(result.fingerprint.of_pool(pool))} {pool}" for pool in ("labeled", "unlabeled", "test"))
    print(f"{result.dataset_name}: {pools} cases, {len(result.split.folds)} folds")
    for pair in result.fingerprint.duplicates:
        print(f"  {pair.first} and {pair.second} show the same image ({pair.kind})")
    for note in result.fingerprint.domain_shift:
        print(f"  {note}")
    rows = [
        [
            name,
            " x ".join(str(n) for n in plan.patch_size),
            " x ".join(f"{mm:g}" for mm in plan.spacing),
            f"{plan.labeled_batch_size} + {plan.unlabeled_batch_size}",
        ]
        for name, plan in result.plans.configurations.items()
    ]
    print_table(["configuration", "patch (voxels)", "spacing (mm)", "batch (labeled + unlabeled)"], rows)
    semi = result.plans.semi_supervised
    print(
        f"recommended: {semi.recommended_configuration}, {semi.total_steps} steps\n"
        f"methods: {_methods(semi.recommended_method)}\n"
        f"plans, with the why of every decision: {result.plans_file}"
    )
    for name, folder in result.data_folders.items():
        print(f"preprocessed for {name}: {folder}")


def _methods(favored: str) -> str:
    """What autossl_run compares where none is named, and what publications favor for as many labels."""
    from autossl.pipeline.recommend import RECOMMENDED_METHODS, TWIN

    if favored == TWIN:
        return f"{TWIN} alone, there is no unlabeled case"
    taken = f"autossl_run compares {TWIN} with {' and '.join(RECOMMENDED_METHODS)} unless -m names others"
    return taken if favored in RECOMMENDED_METHODS else f"{taken}; publications favor {favored} for as many labels"
