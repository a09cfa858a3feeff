"""`autossl_train`: trains a method on folds of a planned dataset."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from autossl.cli.options import (
    add_device,
    add_workspace,
    fold_name,
    label_budget,
    non_negative,
    positive,
    positive_real,
    setting_pair,
)
from autossl.cli.progress import CommandProgress
from autossl.cli.run_command import new_parser, run_command

if TYPE_CHECKING:
    from autossl.data.runs import RunSpec
    from autossl.trainers.setup import RunSetup
    from autossl.trainers.train import TrainRequest, TrainResult

EPILOG = """\
Results go to results/DATASET/SPLIT/CONFIGURATION__PRESET__METHOD[__TAG]__seed-S below the workspace.
Ctrl-C and SIGTERM save the state; --resume goes on from there (and starts a run that does not exist yet). With a larger
--steps it extends a finished run, and says what that does to its schedule.

example: autossl_train 4 3d_fullres 0 -m mean_teacher --preset nano --labeled 8"""


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    return run_command(_parser(), _train, argv)


def _parser() -> argparse.ArgumentParser:
    parser = new_parser("autossl_train", EPILOG)
    parser.add_argument("dataset", metavar="DATASET", help="4, 004, Name or Dataset004_Name")
    parser.add_argument("configuration", metavar="CONFIGURATION", help="2d, 3d_fullres or 3d_lowres")
    parser.add_argument(
        "folds",
        metavar="FOLD",
        nargs="+",
        type=fold_name,
        help="0 1 2 …, all_folds (each in turn), or all (train on everything, without a validation figure)",
    )
    _add_what(parser.add_argument_group("what is trained"))
    _add_labels(parser.add_argument_group("which labels it sees"))
    _add_existing(parser.add_argument_group("what is there already").add_mutually_exclusive_group())
    _add_how(parser.add_argument_group("how"))
    add_workspace(parser)
    return parser


def _add_what(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "-m", "--method", default="supervised", metavar="METHOD", help="see autossl_methods (default: supervised)"
    )
    group.add_argument("--preset", metavar="P", help="which plans (default: plain, or the only ones there are)")
    length = group.add_mutually_exclusive_group()
    length.add_argument("--steps", type=positive, metavar="N", help="length of the run (default: the plan's)")
    length.add_argument(
        "--hours",
        type=positive_real,
        metavar="H",
        help="time for all folds of this call: the speed is measured first and sets the steps",
    )
    group.add_argument("--seed", type=non_negative, default=0, metavar="S", help="of the training (default: 0)")
    group.add_argument(
        "--set",
        dest="settings",
        type=setting_pair,
        nargs="+",
        action="extend",
        default=[],
        metavar="K=V",
        help="change settings of the method; see autossl_methods METHOD",
    )
    group.add_argument("--tag", metavar="T", help="part of the run's name (default: made of changed settings, if any)")
    group.add_argument(
        "--init",
        type=Path,
        metavar="PATH",
        help="weights to start from: a checkpoint, or the folder of a run (each fold from its own fold there)",
    )


def _add_labels(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--labeled",
        type=label_budget,
        metavar="N",
        help="hide all labels but N of each fold's (8), or a fraction of them (0.2); default: all labels",
    )
    group.add_argument(
        "--draw", type=non_negative, default=0, metavar="D", help="which draw of the labels (default: 0)"
    )
    group.add_argument(
        "--deployment",
        action="store_true",
        help="draw the N once for all folds and keep a hidden test set, as autossl_run does",
    )


def _add_existing(group: argparse._MutuallyExclusiveGroup) -> None:
    group.add_argument(
        "--resume", action="store_true", help="go on with what is unfinished; with more --steps, with what is finished"
    )
    group.add_argument("--overwrite", action="store_true", help="remove what exists of these folds and start again")


def _add_how(group: argparse._ArgumentGroup) -> None:
    add_device(group)
    group.add_argument(
        "--num_workers",
        type=non_negative,
        metavar="N",
        help="loader processes per fold; 0: none (default: by the cores)",
    )
    group.add_argument(
        "--save_probabilities",
        action="store_true",
        help="of the validation cases, for ensembles and selection; finished folds get them without training",
    )
    group.add_argument(
        "--deterministic",
        action="store_true",
        help="on CUDA: the same bits every time, and after --resume (slower; on a CPU it is always so)",
    )
    group.add_argument(
        "--compile",
        choices=("auto", "on", "off"),
        help="compile the networks of a new run; auto: where a trial says that it pays (default: off)",
    )


def _train(arguments: argparse.Namespace) -> None:
    from autossl.trainers.train import TrainHooks, train

    with CommandProgress(arguments.quiet) as progress:
        result = train(
            _request(arguments),
            TrainHooks(
                on_start=_announce,
                on_step=lambda fold, done, total, losses: progress.update(f"fold {fold}", done, total, losses),
                on_predict=lambda what, done, total, case: progress.update(what, done, total),
                handle_signals=True,
            ),
        )
    _print_result(result)


def _request(arguments: argparse.Namespace) -> TrainRequest:
    from autossl.trainers.train import TrainRequest

    return TrainRequest(
        dataset=arguments.dataset,
        configuration=arguments.configuration,
        folds=tuple(arguments.folds),
        method=arguments.method,
        workspace=arguments.workspace,
        preset=arguments.preset,
        steps=arguments.steps,
        hours=arguments.hours,
        labeled=arguments.labeled,
        draw=arguments.draw,
        budget_kind="deployment" if arguments.deployment else "benchmark",
        seed=arguments.seed,
        device=arguments.device,
        settings=dict(arguments.settings),
        tag=arguments.tag,
        initial_weights=arguments.init,
        resume=arguments.resume,
        overwrite=arguments.overwrite,
        num_workers=arguments.num_workers,
        compile=arguments.compile,
        deterministic=arguments.deterministic,
        save_probabilities=arguments.save_probabilities,
    )


def _announce(fold: str, setup: RunSetup, spec: RunSpec, folder: Path) -> None:
    cases = setup.folds[fold]
    numbers = (
        f"{len(cases.labeled)} labeled, {len(cases.unlabeled)} unlabeled, {len(cases.validation)} validation cases"
    )
    left_out = f", {len(cases.excluded)} left out as leaks" if cases.excluded else ""
    print(f"fold {fold}: {numbers}{left_out}; {spec.total_steps} steps on {setup.device}; {folder}", flush=True)


def _print_result(result: TrainResult) -> None:
    from autossl.cli.tables import figure, print_table

    for fold in result.folds:
        if not fold.trained_now:
            print(f"fold {fold.fold} was finished before")
    scored = [(fold.fold, fold.validation) for fold in result.folds if fold.validation is not None]
    if scored:
        classes = list(scored[0][1].dice)
        others = sorted({name for _, validation in scored for name in validation.alternatives})
        rows = [
            [
                fold,
                *(figure(validation.dice[name]) for name in classes),
                figure(validation.mean_dice),
                *(figure(validation.alternatives.get(name)) for name in others),
            ]
            for fold, validation in scored
        ]
        columns = ["fold", *classes, "mean", *(f"mean, by {name}" for name in others)]
        print_table(columns, rows, title="full-volume Dice of the validation cases")
    print(f"run: {result.folder}")
