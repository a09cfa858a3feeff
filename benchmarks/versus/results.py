"""The file of results: what was measured, written after every repetition, and the figures and table made of it."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from typing import Any

from autossl.data.files import read_json, write_json
from autossl.data.provenance import Written

from .bench import OURS, Bench, Row, cores

LIBRARIES = ("torch", "numpy", "blosc2", "scipy", "openvino")
MEMORY = "peak_pss_mb"
FEWEST_SAMPLES = 10
"""Of the memory of a run, below which its peak is likely missed."""
NNUNET_VERSIONS = """
import json, platform
from importlib.metadata import version
names = ("nnunetv2", "torch", "numpy", "blosc2", "scipy")
print(json.dumps({name: version(name) for name in names} | {"python": platform.python_version()}))
"""


def conditions(bench: Bench) -> dict[str, Any]:
    """Machine and versions; repetitions under other ones are never put together."""
    asked = [bench.theirs("python"), "-c", NNUNET_VERSIONS]
    done = subprocess.run(asked, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{bench.nnunet} is no environment with nnunetv2:\n{done.stderr[-2000:]}")
    versions = {}
    for name in LIBRARIES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "not installed"
    written = Written.now()
    return {
        "cpu": _first_value("/proc/cpuinfo", "model name"),
        "cores": cores(),
        "memory_gb": round(int(_first_value("/proc/meminfo", "MemTotal").split()[0]) / 2**20, 1),
        "platform": platform.platform(),
        "device": bench.device,
        "threads": bench.threads or "their own choice",
        "commit": written.commit,
        "versions": written.versions | versions,
        "nnunet_versions": json.loads(done.stdout),
    }


class Results:
    """A file of results. What is measured stays; a row goes on where its conditions are the same."""

    def __init__(self, path: Path, now: Mapping[str, Any]) -> None:
        self.path = path
        self._now = dict(now)
        self.rows: dict[str, dict[str, Any]] = read_json(path)["rows"] if path.is_file() else {}

    def open_row(self, row: Row, repeats: int, again: bool = False) -> int:
        """Makes the row ready to be filled; gives the number of repetitions that are missing.

        An unfinished row of other conditions is emptied: its repetitions are no comparison with those to come.

        Raises:
            SystemExit: it was measured with other settings.
        """
        settings = row.settings() | {"threads": row.bench.threads, "variants": list(row.variants())}
        known = None if again else self.rows.get(row.name)
        if known is not None and known["settings"] != settings:
            raise SystemExit(
                f"{self.path}: {row.name} was measured with {known['settings']}, now it is {settings}; "
                "choose another file with -o, or measure it anew with --again"
            )
        done = 0 if known is None else repetitions(known)
        if done >= repeats or (known is not None and known["conditions"] == self._now):
            return max(0, repeats - done)
        self.rows[row.name] = {
            "what": row.what,
            "settings": settings,
            "target": row.target,
            "time": row.time,
            "conditions": self._now,
            "runs": {variant: [] for variant in settings["variants"]},
            "same_work": None,
        }
        return repeats

    def write(self) -> None:
        """With the figures of all rows."""
        for content in self.rows.values():
            content["figures"] = figures(content)
        write_json(self.path, {"rows": self.rows})


def repetitions(row: Mapping[str, Any]) -> int:
    """That every variant has."""
    return min(len(runs) for runs in row["runs"].values())


def figures(row: Mapping[str, Any]) -> dict[str, Any] | None:
    """Medians, and ours over nnU-Net's fastest variant; None before the first repetition."""
    if not repetitions(row):
        return None
    medians = {
        variant: {name: round(median(run[name] for run in runs), 3) for name in runs[0]}
        for variant, runs in row["runs"].items()
    }
    theirs = {variant: values for variant, values in medians.items() if variant != OURS}
    fastest = min(theirs, key=lambda variant: theirs[variant][row["time"]])
    ratios = {"time": round(medians[OURS][row["time"]] / theirs[fastest][row["time"]], 4)}
    if _memory_is_known(medians[OURS]) and _memory_is_known(theirs[fastest]):
        ratios["memory"] = round(medians[OURS][MEMORY] / theirs[fastest][MEMORY], 4)
    same = row["same_work"] is not None and bool(row["same_work"]["same"])
    within = all(name in ratios and ratios[name] <= most for name, most in row["target"].items())
    return {
        "medians": medians,
        "repetitions": repetitions(row),
        "nnunet_fastest": fastest,
        "ratios": ratios,
        "reached": (within and same) if row["target"] else None,
    }


def table(rows: Mapping[str, Mapping[str, Any]]) -> list[list[str]]:
    """Heading and rows."""
    lines = [["row", "autossl", "nnU-Net", "fastest", "time", "memory", "target", "same work", "reached"]]
    for name, row in rows.items():
        found = row.get("figures")
        if found is None:
            continue
        ours, theirs = (found["medians"][variant] for variant in (OURS, found["nnunet_fastest"]))
        target = ", ".join(f"{kind} {most:.3g}" for kind, most in row["target"].items()) or "-"
        same = "not compared" if row["same_work"] is None else "yes" if row["same_work"]["same"] else "NO"
        reached = "-" if found["reached"] is None else "yes" if found["reached"] else "NO"
        lines.append(
            [
                name,
                *(f"{values[row['time']]:.2f} s, {_memory_in_words(values)}" for values in (ours, theirs)),
                found["nnunet_fastest"].removeprefix("nnunet "),
                f"{found['ratios']['time']:.3f}",
                f"{found['ratios']['memory']:.3f}" if "memory" in found["ratios"] else "-",
                target,
                same,
                reached,
            ]
        )
    return lines


def _memory_is_known(values: Mapping[str, float]) -> bool:
    return values["samples"] >= FEWEST_SAMPLES


def _memory_in_words(values: Mapping[str, float]) -> str:
    return f"{values[MEMORY]:.0f} MB" if _memory_is_known(values) else "- MB"


def printed(lines: list[list[str]]) -> str:
    """In columns."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(cell.ljust(n) for cell, n in zip(line, widths, strict=True)).rstrip() for line in lines)


def _first_value(file: str, key: str) -> str:
    """Of a file of lines "key : value"."""
    for line in Path(file).read_text().splitlines():
        name, _, value = line.partition(":")
        if name.strip() == key:
            return value.strip()
    return platform.processor() or os.uname().machine
