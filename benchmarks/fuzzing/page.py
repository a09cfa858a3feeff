"""The figures of the campaign as they stand in SECURITY.md."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from autossl.data.files import atomic_write

BLOCK = re.compile(r"(?<=<!-- fuzz figures -->\n).*?(?=<!-- end -->)", re.DOTALL)
NAMES = {
    "image": "images (NIfTI)",
    "label": "label maps (NIfTI)",
    "description": "dataset.json",
    "table": "cases.csv",
    "plans": "plans.json",
    "checkpoint": "checkpoints",
    "archive": "model archives",
}
ENDED = {
    "reader": "refused while read",
    "checks": "refused by a check",
    "prepared": "prepared or installed",
    "predicted": "predicted",
}


def figures(summary: Mapping[str, Any]) -> str:
    """A table of kinds and stages, and what was seen over all."""
    stages = summary["by kind and stage"]
    rows = [["input", *ENDED.values()], ["---"] * (1 + len(ENDED))]
    rows += [[NAMES[kind], *(str(stages[kind][stage]) for stage in ENDED)] for kind in NAMES]
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    written, share, longest = summary["written"], summary["share past the reader"], summary["most processor seconds"]
    return (
        f"{table}\n\n{summary['inputs']:,} inputs (seed {summary['seed']}), {share:.0%} past the reader; "
        f"{len(summary['faults'])} faults. The longest took {longest:.1f} s of a core, the largest "
        f"{summary['most megabytes']:,} MB. {written['date'][:10]}, commit {written['commit']}.\n"
    )


def write_figures(page: Path, summary: Mapping[str, Any]) -> None:
    """Replaces what stands between the marks of the page."""
    text = page.read_text(encoding="utf-8")
    if not BLOCK.search(text):
        raise SystemExit(f"{page} has no marks for the figures")
    with atomic_write(page) as partial:
        partial.write_text(BLOCK.sub(lambda _: figures(summary), text), encoding="utf-8")
