"""Jobs of ours that no command does alone, in a process of their own: python in_autossl.py JOB TASK.json ANSWER.json"""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from autossl.inference.predictor import Slab

STARTED = time.time()


class EnoughSteps(Exception):
    """Ends a training."""


def train(task: dict[str, Any]) -> dict[str, Any]:
    """Steps of the training that `autossl_train DATASET CONFIGURATION 0` starts; it is stopped, not finished."""
    import torch

    from autossl.networks.build import build_network
    from autossl.trainers.setup import RunSetup
    from autossl.trainers.train import TrainHooks, TrainRequest
    from autossl.trainers.train import train as start_training

    setups: list[RunSetup] = []
    ends: list[float] = []
    shapes: list[list[int]] = []

    def note_input(module: torch.nn.Module, inputs: Any) -> None:
        if not shapes:
            shapes.append(list(inputs[0].shape))

    def on_step(fold: str, done: int, total: int, losses: dict[str, float]) -> None:
        ends.append(time.time())
        hook.remove()
        if len(ends) == task["warm_up"] + task["steps"]:
            raise EnoughSteps

    hook = torch.nn.modules.module.register_module_forward_pre_hook(note_input)
    request = TrainRequest(
        dataset=task["dataset"],
        configuration=task["configuration"],
        folds=("0",),
        workspace=Path(task["workspace"]),
        device=task["device"],
        overwrite=True,
    )
    hooks = TrainHooks(on_start=lambda fold, setup, spec, folder: setups.append(setup), on_step=on_step)
    with contextlib.suppress(EnoughSteps):
        start_training(request, hooks)
    plan, n_outputs = setups[0].configuration, setups[0].schema.n_outputs
    network = build_network(plan.architecture, plan.n_channels, n_outputs)
    return {
        "started": STARTED,
        "ends": ends,
        "patch_size": list(plan.patch_size),
        "input_shape": shapes[0],
        "parameters": sum(parameter.numel() for parameter in network.parameters()),
        "n_outputs": n_outputs,
        "threads": torch.get_num_threads(),
    }


def export(task: dict[str, Any]) -> dict[str, Any]:
    """`restore` and `OutputFolder.write`, as `autossl_predict` does after the network."""
    import numpy as np

    from autossl.data.image_io import read_geometry
    from autossl.inference.model_folder import read_model
    from autossl.inference.outputs import OutputFolder
    from autossl.inference.restore import OriginalGrid, Wanted, restore
    from autossl.preprocessing.resample import find_coarse_axis

    model, output = read_model(Path(task["model"])), Path(task["output"])
    geometry = read_geometry(Path(task["image"]), model.plans.orientation)
    shape, spacing = geometry.shape_zyx, geometry.spacing_zyx_mm
    logits_shape = np.load(task["logits"], mmap_mode="r").shape
    grid = OriginalGrid(
        shape=shape,
        crop=(slice(0, shape[0]), slice(0, shape[1]), slice(0, shape[2])),
        transpose_backward=model.plans.transpose_backward,
        coarse_axis=find_coarse_axis(model.plan.spacing, spacing),
    )
    slabs = _slabs(Path(task["logits"]), task["rows"])
    restored = restore(slabs, logits_shape[1:], grid, model.schema, "softmax")
    OutputFolder(output.parent, ".nii.gz", Wanted(), 1).write(output.name, restored, geometry)
    return {}


def _slabs(path: Path, rows: int) -> Iterator[Slab]:
    """So many rows at a time, read into one float32 buffer, as the predictor's sums are."""
    import numpy as np
    import torch

    from autossl.inference.predictor import Slab

    with path.open("rb") as file:
        np.lib.format.read_magic(file)
        shape, _, dtype = np.lib.format.read_array_header_1_0(file)
        first = file.tell()
        n_classes, n_rows, *plane = shape
        row = int(np.prod(plane))
        held = torch.empty((1, n_classes, min(rows, n_rows), *plane))
        for start in range(0, n_rows, rows):
            n = min(rows, n_rows - start)
            for index in range(n_classes):
                file.seek(first + (index * n_rows + start) * row * dtype.itemsize)
                read = np.fromfile(file, dtype, n * row).reshape(n, *plane)
                held[0, index, :n] = torch.from_numpy(read)
            yield Slab(start, held[:, :, :n])


JOBS = {"train": train, "export": export}

if __name__ == "__main__":
    answer = JOBS[sys.argv[1]](json.loads(Path(sys.argv[2]).read_text()))
    Path(sys.argv[3]).write_text(json.dumps(answer))
