"""What unlabeled cases are worth on one fold: the twin, mean_teacher, and supervised training with all labels.

Runs the installed commands (finished runs are reused, broken ones resumed), reads the full-volume validation summaries
and prints Dice per class with the paired difference to the twin: mean over cases, 95 % bootstrap interval over cases,
wins / ties / losses. One fold, one seed: an interval over cases, not over trainings.

    python benchmarks/first_figures.py --workspace W --dataset 4 --configurations 2d 3d_fullres --labeled 8 --out F.json
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from autossl.data.runs import RunFilter, choose_run
from autossl.data.workspace import Workspace

BOOTSTRAP_DRAWS = 10_000


@dataclass(frozen=True)
class Row:
    """One run of the table."""

    label: str
    method: str
    labeled: str | None


def command(arguments: argparse.Namespace, configuration: str, row: Row) -> list[str]:
    """The command that trains one row; `--resume` reuses what exists."""
    words = ["autossl_train", arguments.dataset, configuration, str(arguments.fold), "-m", row.method]
    words += ["--preset", arguments.preset, "--seed", str(arguments.seed), "--workspace", str(arguments.workspace)]
    words += ["--resume", "--device", arguments.device]
    if arguments.steps is not None:
        words += ["--steps", str(arguments.steps)]
    if row.labeled is not None:
        words += ["--labeled", row.labeled, "--draw", str(arguments.draw)]
    return words


def run(words: list[str], log: Path) -> float:
    """Wall seconds of a command; its output goes to `log`."""
    start = time.time()
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with log.open("a", encoding="utf-8") as file:
        file.write("$ " + " ".join(words) + "\n")
        file.flush()
        subprocess.run(words, stdout=file, stderr=subprocess.STDOUT, check=True, env=environment)
    return time.time() - start


def dice_per_case(summary: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Case → class → Dice; undefined ones are left out."""
    return {
        case: {name: scores["dice"] for name, scores in classes.items() if scores["dice"] is not None}
        for case, classes in summary["cases"].items()
    }


def paired(row: dict[str, dict[str, float]], twin: dict[str, dict[str, float]]) -> dict[str, Any]:
    """Mean over classes of each case's Dice, minus the twin's: mean, 95 % interval over cases, wins / ties / losses."""
    cases = sorted(set(row) & set(twin))
    difference = np.array([np.mean(list(row[c].values())) - np.mean(list(twin[c].values())) for c in cases])
    generator = np.random.default_rng(0)
    draws = generator.choice(difference, (BOOTSTRAP_DRAWS, len(difference))).mean(1)
    low, high = np.percentile(draws, [2.5, 97.5])
    return {
        "mean": float(difference.mean()),
        "interval_95": [float(low), float(high)],
        "wins_ties_losses": [int((difference > 0).sum()), int((difference == 0).sum()), int((difference < 0).sum())],
        "n_cases": len(cases),
    }


def results(arguments: argparse.Namespace, configuration: str, rows: list[Row]) -> list[dict[str, Any]]:
    """One entry per row, in order; the first is the twin."""
    workspace = Workspace.locate(arguments.workspace)
    dataset = workspace.find_dataset(arguments.dataset)
    entries: list[dict[str, Any]] = []
    twin: dict[str, dict[str, float]] = {}
    for row in rows:
        wanted = RunFilter(
            configuration=configuration,
            preset=arguments.preset,
            method=row.method,
            labeled=row.labeled or "all",
            draw=arguments.draw if row.labeled else None,
            seed=arguments.seed,
        )
        found = choose_run(workspace, dataset, wanted)
        folder = found.folder / f"fold_{arguments.fold}"
        summary = json.loads((folder / "validation" / "summary.json").read_text())
        log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
        cases = dice_per_case(summary)
        twin = twin or cases
        entries.append(
            {
                **asdict(row),
                "configuration": configuration,
                "run": str(found.folder.relative_to(workspace.root)),
                "plans_hash": found.spec.plans_hash,
                "steps": found.spec.total_steps,
                "dice": {name: entry["mean"]["dice"] for name, entry in summary["classes"].items()},
                "mean_dice": summary["foreground_mean"]["dice"],
                "to_twin": paired(cases, twin),
                "alternatives": {
                    path.name.removeprefix("validation_"): json.loads((path / "summary.json").read_text())[
                        "foreground_mean"
                    ]["dice"]
                    for path in folder.glob("validation_*")
                },
                "seconds_per_step": float(np.median([1 / line["steps_per_second"] for line in log])),
                "data_wait_share": float(np.median([line["data_wait_share"] for line in log])),
                "peak_memory_mb": max(line["memory_mb"] for line in log),
            }
        )
    return entries


def print_table(entries: list[dict[str, Any]]) -> None:
    """One line per run."""
    for entry in entries:
        classes = "  ".join(f"{name} {value:.4f}" for name, value in entry["dice"].items())
        to_twin = entry["to_twin"]
        low, high = to_twin["interval_95"]
        others = "".join(f"  [{name} {value:.4f}]" for name, value in entry["alternatives"].items())
        print(
            f"{entry['configuration']:<11} {entry['label']:<24} mean {entry['mean_dice']:.4f}  {classes}  "
            f"to twin {100 * to_twin['mean']:+.2f} [{100 * low:+.2f}, {100 * high:+.2f}] "
            f"w/t/l {'/'.join(map(str, to_twin['wins_ties_losses']))}  {entry['seconds_per_step']:.3f} s/step  "
            f"wait {100 * entry['data_wait_share']:.1f} %{others}",
            flush=True,
        )


def main() -> None:
    """Trains what is missing, two runs at a time, then prints and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workspace", type=Path, required=True)
    parser.add_argument("--dataset", required=True)
    parser.add_argument("--configurations", nargs="+", required=True)
    parser.add_argument("--labeled", required=True)
    parser.add_argument("--draw", type=int, default=0)
    parser.add_argument("--fold", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--preset", default="nano")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one thread each")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    rows = [
        Row(f"supervised, {arguments.labeled}", "supervised", arguments.labeled),
        Row(f"mean_teacher, {arguments.labeled}", "mean_teacher", arguments.labeled),
        Row("supervised, all labels", "supervised", None),
    ]
    work = [(configuration, row) for configuration in arguments.configurations for row in rows]
    log_folder = arguments.out.with_suffix("")
    log_folder.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(arguments.jobs) as pool:
        logs = [log_folder / f"{c}_{row.method}_{row.labeled or 'all'}.log" for c, row in work]
        seconds = list(pool.map(run, [command(arguments, c, row) for c, row in work], logs))
    entries = [entry for c in arguments.configurations for entry in results(arguments, c, rows)]
    print_table(entries)
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    content = {
        "dataset": arguments.dataset,
        "fold": arguments.fold,
        "seed": arguments.seed,
        "draw": arguments.draw,
        "commit": commit,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, one thread per run, {arguments.jobs} runs at a time",
        "torch": torch.__version__,
        "wall_seconds_of_this_call": dict(zip([f"{c} {row.label}" for c, row in work], seconds, strict=True)),
        "rows": entries,
    }
    arguments.out.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
