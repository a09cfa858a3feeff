"""`autossl_predict`: segments a folder of images with a trained run."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from autossl.cli.options import add_device, add_run_filter, add_workspace, fold_name, non_negative, positive, share
from autossl.cli.progress import CommandProgress
from autossl.cli.run_command import new_parser, run_command

if TYPE_CHECKING:
    from autossl.inference.predict import PredictProgress
    from autossl.inference.request import PredictRequest

EPILOG = """\
-d alone predicts by the dataset's inference plan (autossl_find_best_configuration); where several splits have one,
--labeled and --draw say which. With -c -m --preset --seed --tag or -f one run predicts: exactly one must fit, otherwise
they are listed.
--modality: for models with a network that sees one modality alone (semi_cml; supervised with --set channels=NAME).
--save_uncertainty: entropy of the mean probabilities, and the disagreement of several folds, as NIfTI.

examples:
  autossl_predict -i IMAGES -o SEGMENTATIONS -d 4
  autossl_predict -i IMAGES -o SEGMENTATIONS -d 4 -c 3d_fullres -m mean_teacher"""


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    return run_command(_parser(), _predict, argv)


def _parser() -> argparse.ArgumentParser:
    parser = new_parser("autossl_predict", EPILOG)
    parser.add_argument("-i", "--input", type=Path, required=True, metavar="FOLDER", help="images, as in imagesTr")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="FOLDER", help="where results are written")
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument("-d", "--dataset", metavar="DATASET", help="dataset that the run was trained on (4 or its name)")
    model.add_argument(
        "--model",
        type=Path,
        metavar="FOLDER",
        help="folder with fold_0 or inference_plan.json, instead of a dataset",
    )
    add_run_filter(parser, "which run of the dataset, instead of its inference plan")
    parser.add_argument(
        "-f", "--folds", nargs="+", type=fold_name, metavar="FOLD", help="default: all finished folds but fold all"
    )
    parser.add_argument(
        "--modality", metavar="NAME", help="from this channel or channel group of dataset.json alone; only it is needed"
    )
    parser.add_argument("--save_probabilities", action="store_true", help="write probabilities/CASE.b2nd as well")
    parser.add_argument("--save_uncertainty", action="store_true", help="write entropy and disagreement as well")
    parser.add_argument(
        "--postprocessing",
        type=Path,
        metavar="FILE",
        help="apply the rules of a postprocessing.json, after those of the inference plan where one is used",
    )
    parser.add_argument("--no_mirroring", action="store_true", help="faster, slightly less accurate")
    parser.add_argument(
        "--step_size", type=share, default=0.5, metavar="S", help="of the window, in its own size (default: 0.5)"
    )
    again = parser.add_mutually_exclusive_group()
    again.add_argument("--resume", action="store_true", help="skip cases whose results are complete")
    again.add_argument("--overwrite", action="store_true", help="predict again what is there")
    parser.add_argument("--num_parts", type=positive, default=1, metavar="N", help="share the work among N commands")
    parser.add_argument("--part_id", type=non_negative, default=0, metavar="K", help="this one's part, 0 to N-1")
    add_device(parser)
    parser.add_argument(
        "--backend",
        choices=("auto", "torch", "openvino"),
        default="auto",
        help="what computes the networks; auto: openvino on a CPU where it is installed, else torch (default: auto)",
    )
    add_workspace(parser)
    return parser


def _predict(arguments: argparse.Namespace) -> None:
    from autossl.inference.predict import predict

    with CommandProgress(arguments.quiet) as progress:

        def show(at: PredictProgress) -> None:
            progress.update("cases", at.done + int(at.share), at.total, {"of this case": at.share})

        result = predict(_request(arguments), show)
    already = f", {len(result.skipped)} were there" if result.skipped else ""
    if result.plan is not None:
        print(f"inference plan: {result.plan}")
    for folder, folds in result.members:
        print(f"run: {folder}, fold {', '.join(folds)}")
    print(f"computed by {result.backend}")
    print(f"{len(result.predicted)} cases predicted{already}: {result.output}")


def _request(arguments: argparse.Namespace) -> PredictRequest:
    from autossl.data.runs import RunFilter
    from autossl.inference.postprocessing_plan import read_postprocessing
    from autossl.inference.request import PredictRequest

    file = arguments.postprocessing
    return PredictRequest(
        input=arguments.input,
        output=arguments.output,
        dataset=arguments.dataset,
        run=RunFilter(
            configuration=arguments.configuration,
            preset=arguments.preset,
            method=arguments.method,
            labeled=arguments.labeled,
            draw=arguments.draw,
            seed=arguments.seed,
            tag=arguments.tag,
        ),
        workspace=arguments.workspace,
        model=arguments.model,
        folds=tuple(arguments.folds) if arguments.folds else None,
        modality=arguments.modality,
        save_probabilities=arguments.save_probabilities,
        save_uncertainty=arguments.save_uncertainty,
        postprocessing=() if file is None else read_postprocessing(file).rules,
        mirroring=not arguments.no_mirroring,
        step_size=arguments.step_size,
        resume=arguments.resume,
        overwrite=arguments.overwrite,
        num_parts=arguments.num_parts,
        part_id=arguments.part_id,
        device=arguments.device,
        backend=arguments.backend,
    )
