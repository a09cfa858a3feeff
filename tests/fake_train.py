"""Stands in for `autossl_train`: writes in milliseconds what a training of a fold leaves behind.

Environment: FAKE_SPECS, a folder with the run.json of every run by name; FAKE_CALLS, a file to add every call to;
FAKE_FAILS, a method that ends with an error; FAKE_WAITS, a method that trains until it is told to stop.
FAKE_FINISHED, a folder of finished runs by split and name: a fold is "trained" by copying it from there, step by step,
and goes on where it was stopped; FAKE_SECONDS, how long a step takes.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import time
from pathlib import Path

DICE = {"supervised": 0.6, "mean_teacher": 0.7, "all": 0.8}
STEPS_PER_SECOND = {"supervised": 10.0, "mean_teacher": 4.0}


def main(words: list[str]) -> int:
    """Trains nothing."""
    if "FAKE_FINISHED" in os.environ:
        return copy_fold(words)
    given = {name: words[words.index(name) + 1] for name in words if name.startswith("-") and name != "--resume"}
    dataset, configuration, fold = words[:3]
    method, steps = given["-m"], int(given["--steps"])
    split = f"benchmark-{given['--labeled']}_draw-{given['--draw']}" if "--labeled" in given else "default"
    name = f"{configuration}__{given['--preset']}__{method}__seed-{given['--seed']}"
    folder = Path(given["--workspace"]) / "results" / dataset / split / name
    started = time.time()
    print(f"training {name}")
    if method == os.environ.get("FAKE_FAILS"):
        print("the reason why it failed")
        return 1
    (folder / f"fold_{fold}").mkdir(parents=True, exist_ok=True)
    spec = (Path(os.environ["FAKE_SPECS"]) / f"{split}__{name}.json").read_text()
    (folder / "run.json").write_text(spec)
    if method == os.environ.get("FAKE_WAITS"):
        signal.signal(signal.SIGTERM, lambda *_: None)
        write_log(folder, fold, 2, method)
        signal.pause()
        print("state saved")
        return 3
    time.sleep(0.1)
    write_log(folder, fold, steps, method)
    (folder / f"fold_{fold}" / "checkpoint_final.pth").write_bytes(b"")
    if fold != "all":
        write_summary(folder, fold, json.loads(spec), DICE["all" if split == "default" else method])
    call = {"words": words, "run": name, "fold": fold, "threads": os.environ.get("OMP_NUM_THREADS")}
    with Path(os.environ["FAKE_CALLS"]).open("a") as file:
        file.write(json.dumps(call | {"from": started, "to": time.time()}) + "\n")
    return 0


def copy_fold(words: list[str]) -> int:
    """A fold of a finished run, one line of log after the other; SIGTERM ends it after a step."""
    (dataset, configuration, fold), value = words[:3], lambda name: words[words.index(name) + 1]
    kind = "deployment" if "--deployment" in words else "benchmark"
    split = f"{kind}-{value('--labeled')}_draw-{value('--draw')}" if "--labeled" in words else "default"
    tag = [value("--tag")] if "--tag" in words else []
    name = "__".join([configuration, value("--preset"), value("-m"), *tag, f"seed-{value('--seed')}"])
    finished = Path(os.environ["FAKE_FINISHED"]) / split / name
    target = Path(value("--workspace")) / "results" / dataset / split / name
    stopped: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, frame: stopped.append(number))
    spec = (finished / "run.json").read_text()
    (target / f"fold_{fold}").mkdir(parents=True, exist_ok=True)
    (target / "run.json").write_text(spec)
    log = target / f"fold_{fold}" / "log.jsonl"
    for step in range(len(log.read_text().splitlines()) if log.is_file() else 0, int(value("--steps"))):
        if stopped:
            print("state saved")
            return 3
        time.sleep(float(os.environ["FAKE_SECONDS"]))
        write_log(target, fold, step + 1, value("-m"))
    for path in sorted(path for path in (finished / f"fold_{fold}").rglob("*") if path.is_file()):
        copied = target / f"fold_{fold}" / path.relative_to(finished / f"fold_{fold}")
        copied.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, copied)
    for path in (path for path in finished.iterdir() if path.is_file()):
        shutil.copyfile(path, target / path.name)
    with Path(os.environ["FAKE_CALLS"]).open("a") as file:
        file.write(json.dumps({"run": name, "fold": fold, "words": words}) + "\n")
    return 0


def write_log(folder: Path, fold: str, steps: int, method: str) -> None:
    """One line per step."""
    line = {"phase": "train", "steps_per_second": STEPS_PER_SECOND[method], "memory_mb": 300.0}
    text = "".join(json.dumps({"step": step, **line}) + "\n" for step in range(1, steps + 1))
    (folder / f"fold_{fold}" / "log.jsonl").write_text(text)


def write_summary(folder: Path, fold: str, spec: dict, dice: float) -> None:
    """Scores that differ from case to case and from seed to seed."""
    cases = {
        case: {"capsule": {"dice": dice + 0.01 * n + 0.001 * spec["seed"]}, "core": {"dice": 0.5}}
        for n, case in enumerate(spec["folds"][fold]["validation"])
    }
    means = [sum(scores[name]["dice"] for scores in cases.values()) / len(cases) for name in ("capsule", "core")]
    path = folder / f"fold_{fold}" / "validation" / "summary.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({"foreground_mean": {"dice": sum(means) / 2}, "cases": cases}))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
