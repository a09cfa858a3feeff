"""One mutated input in a process of its own: how far it came, how it ended, and what it touched on the way."""

from __future__ import annotations

import json
import os
import resource
import shutil
import sys
import tempfile
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from autossl.cli import install_model, plan_and_preprocess, predict
from autossl.data.archive_files import open_archive, read_text
from autossl.data.description import read_description
from autossl.data.image_io import read_image, read_label
from autossl.data.problems import InvalidInput
from autossl.data.raw_dataset import read_raw_dataset
from autossl.inference.checkpoint import read_trained_networks
from autossl.interop.model_archive import MANIFEST_FILE, Manifest, belongs_into_archive
from autossl.planners.plans import read_plans
from fuzzing import mutations
from fuzzing.materials import DATASET, PRESET, RUN, Materials

MEMORY_LIMIT = 2 << 30
KINDS = ("image", "label", "description", "table", "plans", "checkpoint", "archive")
CYCLE = (
    *("image", "plans", "checkpoint", "archive", "image", "description"),
    *("label", "table", "image", "plans", "label", "checkpoint"),
)
STAGES = ("reader", "checks", "prepared", "predicted")
"""Where an input ended: refused while it was read; refused by a check after it; prepared (planned and preprocessed, or
installed) but not predicted with; predicted."""
RESULT = "result.json"
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
CHANGES = frozenset(
    [
        *("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.symlink", "os.link"),
        *("os.truncate", "os.chmod", "os.chown", "os.utime", "shutil.rmtree"),
    ]
)
RUNS = frozenset(
    [
        *("os.system", "os.exec", "os.posix_spawn", "os.spawn"),
        *("subprocess.Popen", "pty.spawn", "socket.connect"),
    ]
)
OURS = ("git", "uname", "ldconfig", "/sbin/ldconfig")
"""Called by libraries and by us to tell versions."""


@dataclass
class Outcome:
    """What became of an input."""

    number: int
    kind: str
    mutation: str
    stage: str = "reader"
    end: str = "refused"
    """done, refused; or a fault: traceback, failed, memory, hang, killed, silent, written outside, executed."""
    codes: list[int] = field(default_factory=list)
    """Of the commands."""
    message: str = ""
    seconds: float = 0.0
    processor_seconds: float = 0.0
    megabytes: int = 0

    @property
    def is_fault(self) -> bool:
        """Whether this is for us to mend."""
        return self.end not in ("done", "refused")


class Watch:
    """Notes what is written outside of a folder, and every program that is called."""

    def __init__(self, allowed: Path) -> None:
        self.allowed = os.path.realpath(allowed)
        self.outside: list[str] = []
        self.executed: list[str] = []

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        """An audit hook."""
        if event == "open" and isinstance(arguments[2], int) and arguments[2] & WRITES:
            self._note(arguments[0])
        elif event in CHANGES:
            for path in arguments[: 2 if event in ("os.rename", "os.link") else 1]:
                self._note(path)
        elif event in RUNS:
            program = str(arguments[0])
            if Path(program).name not in OURS and program not in OURS:
                self.executed.append(f"{event} {arguments!r}"[:300])

    def _note(self, path: Any) -> None:
        if not isinstance(path, str | bytes | os.PathLike):
            return  # a descriptor: what it belongs to was noted when it was opened
        real = os.path.realpath(os.fsdecode(path))
        if not real.startswith((self.allowed + os.sep, "/proc/self/")) and real not in (self.allowed, os.devnull):
            self.outside.append(real)


def kind_of(number: int) -> str:
    """Images are the most; every kind comes in every twelve inputs."""
    return CYCLE[number % len(CYCLE)]


def run_trial(number: int, seed: int, materials: Materials, folder: Path) -> None:
    """Spoils one input and runs all that reads it; to be called in a forked process. Writes `RESULT`."""
    outcome = Outcome(number, kind_of(number), "")
    watch = Watch(folder)
    try:
        # materials.copy_workspace links files; what is spoiled is written anew
        materials.copy_workspace(folder / "workspace")
        random = np.random.default_rng([seed, number])
        place, outcome.mutation = _spoil(outcome.kind, random, materials, folder)
        _confine(folder)
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder / "torch_cache")  # made when parts of torch are imported
        sys.dont_write_bytecode = True  # else the interpreter's own files, beside modules that it first imports here
        sys.addaudithook(watch)
        _go(outcome, place, folder)
        sys.stderr.flush()
    except BaseException:
        outcome.end, outcome.message = "traceback", traceback.format_exc()[-3000:]
    usage = resource.getrusage(resource.RUSAGE_SELF)
    outcome.processor_seconds = round(usage.ru_utime + usage.ru_stime, 3)
    outcome.megabytes = usage.ru_maxrss >> 10
    _judge(outcome, watch, folder)
    (folder / RESULT).write_text(json.dumps(asdict(outcome)))


def _spoil(kind: str, random: np.random.Generator, materials: Materials, folder: Path) -> tuple[Path, str]:
    """Writes the spoiled file into the copied workspace; its place, and what was done to it."""
    workspace = folder / "workspace"
    sources: dict[str, tuple[Path, Callable[[bytes, np.random.Generator], mutations.Mutated]]] = {
        "image": (materials.first("imagesTr"), mutations.mutated_nifti),
        "label": (materials.first("labelsTr"), mutations.mutated_nifti),
        "description": (materials.raw / "dataset.json", mutations.mutated_json),
        "table": (materials.raw / "cases.csv", mutations.mutated_table),
        "plans": (materials.workspace / RUN / "plans.json", mutations.mutated_json),
        "checkpoint": (materials.workspace / RUN / "fold_0" / "checkpoint_final.pth", mutations.mutated_checkpoint),
        "archive": (materials.archive, mutations.mutated_archive),
    }
    source, mutate = sources[kind]
    content, what = mutate(source.read_bytes(), random)
    inside = source.is_relative_to(materials.workspace)
    target = workspace / source.relative_to(materials.workspace) if inside else folder / source.name
    target.unlink(missing_ok=True)
    target.write_bytes(content)
    return target, what


def _confine(folder: Path) -> None:
    """Little memory, messages into files, temporary files inside the folder."""
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (taken + MEMORY_LIMIT, taken + MEMORY_LIMIT))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    (folder / "temporary").mkdir()
    tempfile.tempdir = str(folder / "temporary")
    os.environ["TMPDIR"] = tempfile.tempdir
    os.chdir(folder)
    for name, descriptor in (("out", 1), ("err", 2)):
        file = os.open(folder / name, os.O_WRONLY | os.O_CREAT, 0o600)
        os.dup2(file, descriptor)
    sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115


def _go(outcome: Outcome, place: Path, folder: Path) -> None:
    """The reader alone, to know whether the input comes past it; then the commands that a user would call."""
    workspace = folder / "workspace"
    try:
        _read(outcome.kind, place, workspace)
        outcome.stage = "checks"
    except InvalidInput:
        pass
    predicted: dict[str, Path] = {"model": workspace / RUN, "images": workspace / "raw" / DATASET / "imagesTs"}
    if outcome.kind in ("image", "label", "description", "table"):
        options = ["-d", DATASET, "--workspace", str(workspace), "-np", "0", "--preset", PRESET, "-q"]
        outcome.codes.append(plan_and_preprocess.main([*options, "-c", "3d_fullres"]))
        if outcome.kind == "image":
            predicted["images"] = folder / "images"
            predicted["images"].mkdir()
            shutil.copy(place, predicted["images"])
    elif outcome.kind == "archive":
        outcome.codes.append(install_model.main([str(place), "--workspace", str(workspace), "--name", "fuzz", "-q"]))
        predicted["model"] = workspace / "results" / DATASET / "installed-fuzz"
    if outcome.codes == [0]:
        outcome.stage = "prepared"
    if outcome.kind in ("image", "plans", "checkpoint") or (outcome.kind == "archive" and outcome.codes == [0]):
        output, images = str(folder / "predicted"), str(predicted["images"])
        options = ["-i", images, "-o", output, "--model", str(predicted["model"]), "--no_mirroring", "--device", "cpu"]
        outcome.codes.append(predict.main([*options, "-q"]))
        if outcome.codes[-1] == 0:
            outcome.stage = "predicted"


def _read(kind: str, place: Path, workspace: Path) -> object:
    if kind == "archive":
        try:
            with open_archive(place, belongs_into_archive) as (content, _):
                return Manifest.model_validate(json.loads(read_text(content, MANIFEST_FILE)))
        except (ValueError, KeyError) as error:
            raise InvalidInput(()) from error
    readers: dict[str, Callable[[], object]] = {
        "image": lambda: read_image([place]),
        "label": lambda: read_label(place),
        "description": lambda: read_description(place),
        "table": lambda: read_raw_dataset(workspace / "raw" / DATASET),
        "plans": lambda: read_plans(place),
        "checkpoint": lambda: read_trained_networks(place),
    }
    return readers[kind]()


def _judge(outcome: Outcome, watch: Watch, folder: Path) -> None:
    told = (folder / "err").read_text(errors="replace") if (folder / "err").exists() else ""
    outcome.message = outcome.message or told[-3000:]
    if outcome.end == "traceback":
        return
    if watch.executed:
        outcome.end, outcome.message = "executed", "\n".join(watch.executed)[:3000]
    elif watch.outside:
        outcome.end, outcome.message = "written outside", "\n".join(watch.outside)[:3000]
    elif outcome.megabytes > MEMORY_LIMIT >> 20:
        outcome.end = "memory"
    elif "Traceback" in told:
        outcome.end = "traceback"
    elif any(code not in (0, 2) for code in outcome.codes):
        outcome.end = "memory" if "memory" in told else "failed"
    elif 2 in outcome.codes and not ("Expected: " in told and "What to do: " in told):
        outcome.end = "silent"
    else:
        outcome.end = "refused" if 2 in outcome.codes else "done"
