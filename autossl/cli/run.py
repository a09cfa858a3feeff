"""`autossl_run`: from the raw folder to the final model and its report."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from autossl.cli.options import (
    add_device,
    add_workers,
    add_workspace,
    label_budget,
    method_setting,
    non_negative,
    positive,
    positive_real,
    settings_by_method,
)
from autossl.cli.progress import CommandProgress, duration
from autossl.cli.run_command import new_parser, run_command

if TYPE_CHECKING:
    from autossl.pipeline.engine import Event
    from autossl.pipeline.experiment import ExperimentRequest, ExperimentResult, Outlook

EPILOG = """\
Plans, splits, preprocesses, trains all folds of the supervised twin and of each method, judges whether the unlabeled
cases helped, chooses the final model, finds its postprocessing, and writes the report. Stopped or killed, the same
command goes on where it was. Results go to results/DATASET/SPLIT below the workspace (docs/run.md).

example: autossl_run Hippocampus
         autossl_run Hippocampus -c 2d --preset nano -m mean_teacher --labeled 20"""


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    return run_command(_parser(), _run, argv)


def _parser() -> argparse.ArgumentParser:
    parser = new_parser("autossl_run", EPILOG)
    parser.add_argument("dataset", metavar="DATASET", help="4, 004, Name or Dataset004_Name")
    parser.add_argument(
        "-c",
        "--configurations",
        nargs="+",
        default=[],
        metavar="C",
        help="2d 3d_fullres … (default: the plan's)",
    )
    parser.add_argument(
        "-m",
        "--methods",
        nargs="+",
        default=[],
        metavar="METHOD",
        help="besides supervised, which is always trained; see autossl_methods (default: mean_teacher cps)",
    )
    parser.add_argument("--preset", metavar="P", help="plain, resenc_m, resenc_l, resenc_xl or nano (default: plain)")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--steps", type=positive, metavar="N", help="length of every run (default: the plan's)")
    length.add_argument(
        "--hours", type=positive_real, metavar="H", help="time for everything: speeds are measured and set the steps"
    )
    parser.add_argument(
        "--labeled",
        type=label_budget,
        metavar="N",
        help="use N labels only (20), or a fraction of them (0.2), drawn once; of the other patients some become a "
        "hidden test set that shows what the verdict was worth (default: all labels)",
    )
    parser.add_argument(
        "--draw", type=non_negative, default=0, metavar="D", help="which draw of the labels (default: 0)"
    )
    parser.add_argument("--seed", type=non_negative, default=0, metavar="S", help="of the trainings (default: 0)")
    parser.add_argument(
        "--set",
        dest="settings",
        type=method_setting,
        nargs="+",
        action="extend",
        default=[],
        metavar="METHOD.K=V",
        help="change settings of a method; see autossl_methods METHOD",
    )
    parser.add_argument("--tag", metavar="T", help="part of the runs' names, to keep them apart from others")
    parser.add_argument(
        "--final", metavar="METHOD", help="method of the final model (default: by verdict and out-of-fold scores)"
    )
    parser.add_argument(
        "--equal_time",
        action="store_true",
        help="also train supervised for as long as the slowest method takes (--hours alone adds it where it fits in)",
    )
    parser.add_argument(
        "-n", "--label_next", type=positive, default=10, metavar="N", help="cases to label next (default: 10)"
    )
    _add_how(parser)
    return parser


def _add_how(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--num_workers", type=non_negative, metavar="N", help="loader processes per training (default: by the cores)"
    )
    parser.add_argument("--engine", default="local", metavar="E", help="what runs the steps: local (default: local)")
    part = parser.add_mutually_exclusive_group()
    part.add_argument(
        "--dry_run",
        action="store_true",
        help="plan, measure some steps on made-up images, print time, disk and memory of every step, and stop",
    )
    part.add_argument("--step", metavar="NAME", help="run this step alone, of a planned dataset: for other engines")
    add_workers(parser, "read and preprocess cases", beside_loaders=True)
    add_device(parser)
    add_workspace(parser)


def _run(arguments: argparse.Namespace) -> None:
    from autossl.pipeline.experiment import dry_run, run_experiment, run_step

    request = _request(arguments)
    with CommandProgress(arguments.quiet) as progress:
        narrator = _Narrator(progress, arguments.quiet)
        if arguments.dry_run:
            outlook = dry_run(request, narrator.tell, narrator.measured)
        elif arguments.step is not None:
            result = run_step(request, arguments.step, narrator.tell)
        else:
            result = run_experiment(request, narrator.tell, narrator.measured)
    if arguments.dry_run:
        _print_outlook(outlook)
    elif arguments.step is None:
        _print_result(result)


def _request(arguments: argparse.Namespace) -> ExperimentRequest:
    from autossl.pipeline.request import ExperimentRequest

    return ExperimentRequest(
        dataset=arguments.dataset,
        workspace=arguments.workspace,
        configurations=tuple(arguments.configurations),
        methods=tuple(arguments.methods),
        preset=arguments.preset,
        labeled=arguments.labeled,
        draw=arguments.draw,
        steps=arguments.steps,
        hours=arguments.hours,
        seed=arguments.seed,
        device=arguments.device,
        settings=settings_by_method(arguments.settings),
        tag=arguments.tag,
        final=arguments.final,
        equal_time=arguments.equal_time,
        n_label_next=arguments.label_next,
        engine=arguments.engine,
        num_workers=arguments.num_workers,
        num_processes=arguments.num_processes,
    )


class _Narrator:
    """Says which step of how many runs, and how much time is left."""

    def __init__(self, progress: CommandProgress, quiet: bool) -> None:
        self._progress, self._quiet = progress, quiet

    def tell(self, event: Event) -> None:
        """Of a step."""
        of = f" of {event.n_steps}" if event.n_steps else ""
        name = f"step {event.number}{of}: {event.step.name}"
        if event.state == "started" and not self._quiet:
            left = "" if event.seconds_left is None else f" (about {duration(event.seconds_left)} left in all)"
            self._progress.say(f"{name}{left}")
        if event.total:
            self._progress.update(name, event.done, event.total, event.figures)

    def measured(self, done: int, total: int, figures: Mapping[str, float]) -> None:
        """Of the measuring of speeds."""
        self._progress.update("measuring speeds", done, total, figures)


def _print_outlook(outlook: Outlook) -> None:
    from autossl.cli.tables import print_table

    rows = []
    for number, (step, done, estimate) in enumerate(outlook.steps, start=1):
        time = "done" if done else _shown(estimate.seconds, duration)
        disk, memory = _shown(estimate.disk_bytes, _bytes), _shown(estimate.memory_bytes, _bytes)
        rows.append([f"{number} {step.name}", time, "" if done else disk, "" if done else memory])
    print_table(["step", "about", "disk", "memory"], rows)
    experiment = outlook.experiment
    print(
        f"{experiment.dataset}, split {experiment.split}: {', '.join(experiment.configurations)} with supervised"
        + "".join(f", {method}" for method in experiment.methods)
    )
    for what, why in experiment.why.items():
        print(f"{what}: {why}")
    devices = f", {outlook.n_devices} trainings side by side" if outlook.n_devices > 1 else ""
    print(
        f"about {duration(outlook.seconds)} in all{devices}; {_bytes(outlook.disk_bytes)} on disk; "
        f"{_bytes(outlook.memory_bytes)} of memory at most. Measured with made-up images; a dash: not known, little."
    )


def _shown(value: float | None, form: Callable[[float], str]) -> str:
    return form(value) if value else "-"


def _bytes(number: float) -> str:
    """In words: 12 MB, 3.4 GB."""
    return f"{number / 1e9:.1f} GB" if number >= 1e9 else f"{number / 1e6:.0f} MB"


def _print_result(result: ExperimentResult) -> None:
    for line in result.lines():
        print(line)
