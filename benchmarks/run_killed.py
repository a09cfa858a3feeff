"""Runs `autossl_run` on a data set twice, once unbroken and once killed on the way, and compares all that both made.

The killed one ends twice by SIGKILL: first the command alone, so that its training must end by itself, then the whole
tree of processes; each time it is called again with the same words. Compared are weights, memories, logs without times,
plans, arrays, predictions and results, to the bit. The figures of the unbroken run are kept beside: the verdict from
its out-of-fold scores, and what its hidden test set says.

    python benchmarks/run_killed.py --raw RAW_FOLDER --folder SCRATCH -o benchmarks/results/run_hippocampus_20.json \\
        -- Hippocampus -c 2d --preset nano --labeled 20 -m mean_teacher cps --steps 1000

The script may be stopped and called again; what is finished is compared without running anything.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kills.state import differences, state_of

from autossl.data.files import read_json, write_json
from autossl.data.provenance import Written
from autossl.data.runs import CHECKPOINT_FINAL
from autossl.evaluation.benchmark.provenance import machine

UNBROKEN, KILLED, KILLS_FILE = "unbroken", "killed", "kills.txt"
KILLS = ((0.15, False), (0.6, True))
"""After which share of the trained folds, and whether the whole tree is killed."""


def main() -> int:
    """Entry point; exit code 1 where the two differ."""
    arguments = _parser().parse_args()
    words = [str(Path(sys.executable).parent / "autossl_run"), *arguments.words]
    for name in (UNBROKEN, KILLED):
        _lay_out(arguments.raw, arguments.folder / name)
    if _call(words, arguments.folder / UNBROKEN).wait():
        raise SystemExit(f"the unbroken run failed: see {arguments.folder / UNBROKEN / 'output.txt'}")
    n_folds = len(_trained(arguments.folder / UNBROKEN))
    for share, whole in KILLS:
        _kill_after(round(share * n_folds), whole, words, arguments.folder / KILLED)
    if _call(words, arguments.folder / KILLED).wait():
        raise SystemExit(f"the killed run failed: see {arguments.folder / KILLED / 'output.txt'}")
    content = compared(arguments.folder / UNBROKEN, arguments.folder / KILLED)
    head = {"what": (__doc__ or "").splitlines()[0], "words": arguments.words, "machine": machine("cpu")}
    write_json(arguments.output, {**head, **content, "written": Written.now().model_dump(mode="json")})
    print(f"{content['files']} files, {content['checkpoints']} checkpoints: {len(content['different'])} differ")
    return bool(content["different"])


def compared(unbroken: Path, killed: Path) -> dict[str, Any]:
    """What two workspaces have in common, and the figures of the first.

    Args:
        unbroken: Workspace.
        killed: Workspace.
    """
    expected, found = state_of(unbroken), state_of(killed)
    results = next(unbroken.glob("results/*/*/verdict.json")).parent
    hidden = read_json(results / "hidden_test.json") if (results / "hidden_test.json").is_file() else None
    return {
        "kills": (killed.parent / KILLS_FILE).read_text().splitlines(),
        "files": len(expected),
        "checkpoints": sum(name.endswith(".pth") for name in expected),
        "label_maps": sum(name.endswith((".nii.gz", ".png")) and "results" in name for name in expected),
        "different": differences(expected, found),
        "verdict": read_json(results / "verdict.json"),
        "final": read_json(results / "inference_plan.json")["members"],
        "hidden_test": hidden,
    }


def _lay_out(raw: Path, workspace: Path) -> None:
    target = workspace / "raw" / raw.name
    if not target.is_dir():
        partial = target.with_name("partial")
        shutil.rmtree(partial, ignore_errors=True)
        shutil.copytree(raw, partial)
        partial.rename(target)


def _call(words: Sequence[str], workspace: Path) -> subprocess.Popen[bytes]:
    with (workspace / "output.txt").open("ab") as output:
        more = ["--workspace", str(workspace)]
        return subprocess.Popen([*words, *more], stdout=output, stderr=subprocess.STDOUT, start_new_session=True)


def _trained(workspace: Path) -> list[Path]:
    return sorted(workspace.glob(f"results/*/*/*/fold_*/{CHECKPOINT_FINAL}"))


def _kill_after(n_folds: int, whole: bool, words: Sequence[str], workspace: Path) -> None:
    """Kills a call some seconds after so many folds are trained; one that has come further is left alone."""
    if len(_trained(workspace)) > n_folds:
        return
    process = _call(words, workspace)
    while len(_trained(workspace)) < n_folds:
        time.sleep(1)
        if process.poll() is not None:
            raise SystemExit(f"it ended by itself, exit code {process.returncode}: see {workspace / 'output.txt'}")
    time.sleep(random.Random(n_folds).uniform(5, 30))
    if whole:
        os.killpg(process.pid, signal.SIGKILL)
    else:
        process.kill()
    process.wait()
    happened = f"{'all processes' if whole else 'the command alone'}, after {len(_trained(workspace))} trained folds"
    with (workspace.parent / KILLS_FILE).open("a") as file:
        file.write(f"{happened}\n")
    print(f"killed {happened}", flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--raw", type=Path, required=True, help="raw data set; copied")
    parser.add_argument("--folder", type=Path, required=True, help="for both workspaces; kept, to go on from")
    parser.add_argument("-o", "--output", type=Path, required=True, help="JSON with the figures")
    parser.add_argument("words", nargs="+", help="of autossl_run, after --")
    return parser


if __name__ == "__main__":
    sys.exit(main())
