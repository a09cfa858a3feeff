"""`autossl_benchmark`: methods side by side, each beside its supervised twin."""

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
    method_setting,
    non_negative,
    positive,
    settings_by_method,
)
from autossl.cli.progress import CommandProgress, duration
from autossl.cli.run_command import FAILED, new_parser, run_command

if TYPE_CHECKING:
    from autossl.evaluation.benchmark.benchmark import BenchmarkOptions, BenchmarkRequest, BenchmarkResult, Outlook

EPILOG = """\
Trains what is missing with autossl_train (finished runs are reused, stopped ones go on), always with the supervised
twin: the same plans, steps, seeds, folds and labels. Then one table: Dice, difference to the twin with an interval,
p, cost of a step, memory; as text, CSV, JSON and a picture. docs/benchmark.md says what the figures mean.

example: autossl_benchmark 4 2d -m mean_teacher --labeled 8 --full_labels --steps 1000 --seeds 0 1 2 --jobs 2"""


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; 1 where a training failed or --verify found a figure that the label maps do not give."""
    faults: list[str] = []
    code = run_command(_parser(), lambda arguments: faults.extend(_benchmark(arguments)), argv)
    return code or (FAILED if faults else 0)


def _parser() -> argparse.ArgumentParser:
    parser = new_parser("autossl_benchmark", EPILOG)
    parser.add_argument("dataset", metavar="DATASET", help="4, 004, Name or Dataset004_Name")
    parser.add_argument("configuration", metavar="CONFIGURATION", help="2d, 3d_fullres or 3d_lowres")
    parser.add_argument(
        "-m",
        "--methods",
        nargs="+",
        required=True,
        metavar="METHOD",
        help="besides supervised; see autossl_methods. METHOD:ablation is a row without what makes the method itself, "
        "METHOD:NAME one with settings of its own",
    )
    _add_what_is_compared(parser)
    parser.add_argument("--jobs", type=positive, default=1, metavar="J", help="trainings side by side (default: 1)")
    parser.add_argument(
        "--num_workers", type=non_negative, metavar="N", help="loader processes per training (default: by the cores)"
    )
    parser.add_argument(
        "-o", "--output", type=Path, metavar="FOLDER", help="default: results/DATASET/benchmarks/… in the workspace"
    )
    parser.add_argument(
        "--history",
        type=Path,
        metavar="FILE",
        help="every finished run is appended here once (default: results/DATASET/benchmarks/history.jsonl)",
    )
    parser.add_argument("--verify", action="store_true", help="score the kept validation label maps again and compare")
    cost = parser.add_mutually_exclusive_group()
    cost.add_argument("--no_cost", action="store_true", help="do not time the methods' steps")
    cost.add_argument(
        "--cost_steps",
        type=positive,
        metavar="N",
        help="time all methods anew with runs of N steps (default: 60, those that were not timed)",
    )
    little = parser.add_mutually_exclusive_group()
    little.add_argument("--table_only", action="store_true", help="train and time nothing")
    little.add_argument("--dry_run", action="store_true", help="say what would be trained, and stop")
    add_device(parser)
    add_workspace(parser)
    return parser


def _add_what_is_compared(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--labeled",
        type=label_budget,
        nargs="+",
        default=[],
        metavar="N",
        help="hide all labels but N of each fold's (8), or a fraction of them (0.2); default: all labels",
    )
    parser.add_argument(
        "--full_labels", action="store_true", help="also train supervised with all labels, for the gap that is left"
    )
    parser.add_argument(
        "--draws", type=non_negative, nargs="+", default=[0], metavar="D", help="draws of the labels (default: 0)"
    )
    parser.add_argument(
        "--folds", type=fold_name, nargs="+", default=["0"], metavar="F", help="0 1 2 … or all_folds (default: 0)"
    )
    parser.add_argument(
        "--seeds", type=non_negative, nargs="+", default=[0], metavar="S", help="of the trainings (default: 0)"
    )
    parser.add_argument("--steps", type=positive, metavar="N", help="length of every run (default: the plan's)")
    parser.add_argument("--preset", metavar="P", help="which plans (default: plain, or the only ones there are)")
    parser.add_argument(
        "--set",
        dest="settings",
        type=method_setting,
        nargs="+",
        action="extend",
        default=[],
        metavar="METHOD.K=V",
        help="change settings of a method, or of a row METHOD:NAME alone; see autossl_methods METHOD",
    )


def _benchmark(arguments: argparse.Namespace) -> list[str]:
    """Runs and prints; what went wrong in single runs."""
    from autossl.evaluation.benchmark.benchmark import run_benchmark, what_would_run

    if arguments.dry_run:
        _print_outlook(what_would_run(_request(arguments)))
        return []
    with CommandProgress(arguments.quiet) as progress:
        result = run_benchmark(_request(arguments), _options(arguments), progress.update)
    return _print_result(result)


def _request(arguments: argparse.Namespace) -> BenchmarkRequest:
    from autossl.evaluation.benchmark.benchmark import BenchmarkRequest

    return BenchmarkRequest(
        dataset=arguments.dataset,
        configuration=arguments.configuration,
        methods=tuple(arguments.methods),
        workspace=arguments.workspace,
        labeled=tuple(arguments.labeled),
        draws=tuple(arguments.draws),
        folds=tuple(arguments.folds),
        seeds=tuple(arguments.seeds),
        steps=arguments.steps,
        preset=arguments.preset,
        device=arguments.device,
        settings=settings_by_method(arguments.settings),
        full_labels=arguments.full_labels,
        jobs=arguments.jobs,
        num_workers=arguments.num_workers,
    )


def _options(arguments: argparse.Namespace) -> BenchmarkOptions:
    from autossl.evaluation.benchmark.benchmark import BenchmarkOptions

    return BenchmarkOptions(
        output=arguments.output,
        history=arguments.history,
        table_only=arguments.table_only,
        cost=not arguments.no_cost,
        cost_steps=arguments.cost_steps,
        verify=arguments.verify,
    )


def _print_outlook(outlook: Outlook) -> None:
    from autossl.cli.tables import print_table

    rows = [
        [str(run), str(run.spec.total_steps - left), str(left), _time(outlook.seconds.get(run))]
        for run, left in outlook.steps_left.items()
    ]
    n_runs, unknown = len(outlook.plan.runs), len(rows) - len(outlook.seconds)
    if rows:
        print_table(["run", "steps done", "steps left", "about"], rows)
    print(f"{n_runs - len(rows)} of {n_runs} runs are finished; {len(rows)} would be trained on {outlook.plan.device}.")
    if outlook.seconds:
        besides = f", and {unknown} runs of methods whose speed is not known yet" if unknown else ""
        print(f"About {duration(outlook.total_seconds)} by the speed of earlier runs{besides}.")


def _time(seconds: float | None) -> str:
    return "not known" if seconds is None else duration(seconds)


def _print_result(result: BenchmarkResult) -> list[str]:
    """Prints all and gives what went wrong."""
    from autossl.cli.tables import print_table
    from autossl.evaluation.benchmark.report import notes, summary_cells

    columns, lines = summary_cells(result.table)
    print_table(columns, lines)
    for note in notes(result.table):
        print(note)
    for failed in result.failed:
        print(f"\n{failed}")
    found = result.verification
    if found is not None:
        verdict = "all agree" if not found.disagreements else f"{len(found.disagreements)} figures do not agree"
        print(f"\nverified: {found.n_label_maps} label maps of {found.n_runs} runs scored again, {verdict}")
        for text in found.disagreements:
            print(f"  {text}")
    print(f"\ntable.txt, table.csv, table.json, table.png, logs: {result.output}")
    print(f"history: {result.history} ({result.n_new_in_history} new)")
    return [*map(str, result.failed), *(found.disagreements if found else ())]
