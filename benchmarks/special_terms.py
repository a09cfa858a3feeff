"""What the terms of finished runs did: their share of the gradient, and of the samples, voxels or pairs.

Reads the logs of the runs of a table of autossl_benchmark; trains nothing. Shares of the gradient are
|g| / (|g| + |g_s|) on the weights that the supervised terms reach, measured now and then in training
(`autossl.trainers.gradient_share`). Means over a phase, all folds and runs alike. A share under 1 % is marked: it is to
be explained, or the term is there in name only.

    python benchmarks/special_terms.py benchmarks/results/table_lgg_2d.json --workspace W \\
        -o benchmarks/results/special_terms_lgg_2d.json
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from pathlib import Path
from statistics import fmean
from typing import Any

LITTLE = 0.01
"""Under it a share is marked."""

Figures = dict[str, list[float]]


def read(folder: Path, into: dict[str, dict[str, Figures]]) -> bool:
    """Adds the lines of a run by phase; False where nothing of it is logged."""
    logs = sorted(folder.glob("fold_*/log.jsonl"))
    for log in logs:
        for line in log.read_text(encoding="utf-8").splitlines():
            entry = json.loads(line)
            if "phase" not in entry:
                continue
            phase = into[entry["phase"]]
            for name, share in entry["gradient_share"].items():
                phase["gradient"].setdefault(name, []).append(share)
            for name, value in entry["measures"].items():
                if name.endswith("share") and value is not None:
                    phase["touched"].setdefault(name, []).append(value)
    return bool(logs)


def averaged(figures: Figures) -> dict[str, dict[str, float]]:
    """Mean, smallest, largest, and of how many measurements."""
    return {
        name: {"mean": fmean(values), "least": min(values), "most": max(values), "n": len(values)}
        for name, values in sorted(figures.items())
    }


def table(found: dict[str, Any]) -> str:
    """For a screen."""
    lines = [f"{'':24}{'':14}{'of the gradient, % mean (least to most)':64}touched, % mean"]
    for method, phases in found.items():
        for phase, kinds in phases.items():
            gradient = ", ".join(
                f"{name} {100 * f['mean']:.1f} ({100 * f['least']:.1f} to {100 * f['most']:.1f})"
                f"{' <1 %' if f['mean'] < LITTLE else ''}"
                for name, f in kinds["gradient"].items()
            )
            touched = ", ".join(
                f"{name} {100 * f['mean']:.1f}{' <1 %' if f['mean'] < LITTLE else ''}"
                for name, f in kinds["touched"].items()
            )
            lines.append(f"{method:24}{phase:14}{gradient or '-':64}{touched or '-'}")
    return "\n".join(lines)


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description="What the terms of finished runs did.")
    parser.add_argument("table", type=Path, help="table.json; its rows name the methods and their runs")
    parser.add_argument("--workspace", type=Path, required=True, help="where the runs lie")
    parser.add_argument("-o", type=Path, help="JSON")
    asked = parser.parse_args()
    raw: dict[str, dict[str, dict[str, Figures]]] = {}
    read_from: dict[str, list[str]] = defaultdict(list)
    for row in json.loads(asked.table.read_text(encoding="utf-8"))["rows"]:
        into = raw.setdefault(row["method"], defaultdict(lambda: {"gradient": {}, "touched": {}}))
        for run in row["runs"]:
            if not read(asked.workspace / run["run"], into):
                parser.error(f"{asked.workspace / run['run']}: no fold_*/log.jsonl there. Give the table's workspace")
            read_from[row["method"]].append(run["run"])
    found = {
        method: {phase: {kind: averaged(figures) for kind, figures in kinds.items()} for phase, kinds in phases.items()}
        for method, phases in raw.items()
    }
    print(table(found))
    if asked.o:
        asked.o.write_text(
            json.dumps({m: {"runs": read_from[m], "phases": found[m]} for m in found}, indent=1) + "\n",
            encoding="utf-8",
        )


if __name__ == "__main__":
    main()
