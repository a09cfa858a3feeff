"""How long a batch takes to make, and how much of a training step is spent waiting for one.

Per configuration, on preprocessed cases of a workspace (nothing is written there):

- *making*: CPU milliseconds of one process per batch of the method's own request, mean and worst, and how much of
  that is reading (decompression), geometry and intensities;
- *training*: real steps of the method on the device with 0, 1, … workers: milliseconds per step and the share of them
  that the loop waits for data. The first interval, in which workers start, is left out.

    python benchmarks/loading.py --workspace W --dataset 4 --configurations 2d 3d_fullres --labeled 8 -o F.json
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest import mock

import numpy as np
import torch

from autossl.trainers.augmentation import GeometricAugmentation, IntensityAugmentation
from autossl.trainers.base import Progress
from autossl.trainers.batches import BatchMaker
from autossl.trainers.loop import LoopOptions, TrainingLoop
from autossl.trainers.patch_reader import CaseReader
from autossl.trainers.setup import RunSetup, TrainRequest, resolve
from autossl.trainers.source import FoldSource
from autossl.version import __version__

PARTS = {
    "reading": (CaseReader, "read"),
    "geometry": (GeometricAugmentation, "apply"),
    "intensities": (IntensityAugmentation, "apply"),
}
WARM_UP = 3


@contextmanager
def timed_parts(seconds: dict[str, float]) -> Iterator[None]:
    """Adds up the CPU time of each part while it is open."""

    def timed(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            start = time.process_time()
            try:
                return function(*args, **kwargs)
            finally:
                seconds[name] = seconds.get(name, 0.0) + time.process_time() - start

        return call

    patches = [mock.patch.object(kind, name, timed(part, getattr(kind, name))) for part, (kind, name) in PARTS.items()]
    for patch in patches:
        patch.start()
    try:
        yield
    finally:
        for patch in patches:
            patch.stop()


def making(setup: RunSetup, fold: str, batches: int) -> dict[str, Any]:
    """CPU time per batch of one process."""
    maker = BatchMaker(setup.streams(fold), setup.configuration, setup.schema, setup.request.seed)
    request = setup.method(setup.job(fold, batches), setup.settings).request(Progress(step=0, total=batches))
    for step in range(WARM_UP):
        maker.make(step, request)
    times, parts = [], dict.fromkeys(PARTS, 0.0)
    with timed_parts(parts):
        for step in range(WARM_UP, WARM_UP + batches):
            start = time.process_time()
            maker.make(step, request)
            times.append(1000 * (time.process_time() - start))
    return {
        "patches": [request.labeled.count, request.unlabeled.count],
        "views_of_unlabeled": request.unlabeled.views,
        "cpu_ms_mean": float(np.mean(times)),
        "cpu_ms_median": float(np.median(times)),
        "cpu_ms_worst": float(np.max(times)),
        "patches_per_cpu_second": 1000 * (request.labeled.count + request.unlabeled.count) / float(np.mean(times)),
        "of_that_ms": {name: 1000 * value / batches for name, value in parts.items()},
    }


def training(setup: RunSetup, fold: str, num_workers: int, steps: int) -> dict[str, Any]:
    """Speed and data wait of real steps."""
    half = max(1, steps // 2)
    with TemporaryDirectory() as folder:
        source = FoldSource(
            setup.streams(fold),
            setup.configuration,
            setup.schema,
            setup.request.seed,
            Path(folder) / "stores",
            num_workers,
            pin_memory=setup.device.startswith("cuda"),
        )
        options = LoopOptions(
            2 * half, setup.device, log_every=half, checkpoint_every=2 * half, seed=setup.request.seed
        )
        TrainingLoop(setup.method(setup.job(fold, 2 * half), setup.settings), source, Path(folder), options).run()
        last = json.loads((Path(folder) / "log.jsonl").read_text(encoding="utf-8").splitlines()[-1])
    return {
        "workers": num_workers,
        "steps": half,
        "ms_per_step": 1000 / last["steps_per_second"],
        "data_wait_share": last["data_wait_share"],
    }


def measured(arguments: argparse.Namespace, configuration: str, method: str) -> dict[str, Any]:
    """All figures of one configuration and method."""
    request = TrainRequest(
        dataset=arguments.dataset,
        configuration=configuration,
        folds=(arguments.fold,),
        method=method,
        workspace=arguments.workspace,
        preset=arguments.preset,
        steps=arguments.steps,
        labeled=arguments.labeled,
        seed=arguments.seed,
        device=arguments.device,
    )
    setup = resolve(request)
    return {
        "configuration": configuration,
        "method": method,
        "patch_size": list(setup.configuration.patch_size),
        "channels": setup.configuration.n_channels,
        "making": making(setup, arguments.fold, arguments.batches),
        "training": [training(setup, arguments.fold, workers, arguments.steps) for workers in arguments.workers],
    }


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workspace", type=Path, required=True)
    parser.add_argument("--dataset", required=True)
    parser.add_argument("--configurations", nargs="+", default=["2d", "3d_fullres"])
    parser.add_argument("--methods", nargs="+", default=["mean_teacher"])
    parser.add_argument("--preset", default="nano")
    parser.add_argument("--labeled", metavar="N")
    parser.add_argument("--fold", default="0")
    parser.add_argument("--batches", type=int, default=60, help="made for the time per batch")
    parser.add_argument("--steps", type=int, default=20, help="trained; the second half is measured")
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--threads", type=int, default=1, help="of torch, in training")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("-o", "--output", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    asked = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    result = {
        "dataset": arguments.dataset,
        "preset": arguments.preset,
        "labeled": arguments.labeled,
        "seed": arguments.seed,
        "threads": arguments.threads,
        "device": arguments.device,
        "machine": {"cpus": os.cpu_count(), "processor": platform.processor() or platform.machine()},
        "versions": {"autossl": __version__, "torch": torch.__version__, "python": platform.python_version()},
        "commit": subprocess.run(asked, capture_output=True, text=True, check=False).stdout.strip(),
        "results": [measured(arguments, c, m) for c in arguments.configurations for m in arguments.methods],
    }
    text = json.dumps(result, indent=2)
    print(text)
    if arguments.output:
        arguments.output.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
