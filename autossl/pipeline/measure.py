"""How long a step takes and what it needs: a few real steps of the plan's network on made-up images."""

from __future__ import annotations

import logging
import multiprocessing
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import numpy.typing as npt
import torch

from autossl.data.files import content_hash, read_json, write_json
from autossl.data.labels import LabelSchema
from autossl.data.store import CaseStore, write_array
from autossl.trainers.batches import Streams
from autossl.trainers.loop import peak_memory_mb, place_parts
from autossl.trainers.memory_trial import state_bytes
from autossl.trainers.refresh import blank_pseudo_labels
from autossl.trainers.setup import RunSetup, TrainRequest, median_case_shape, resolve
from autossl.trainers.source import FoldSource
from autossl.trainers.speed import seconds_per_step
from autossl.trainers.train import default_workers, loop_options, share_cores

logger = logging.getLogger(__name__)

OnMeasured = Callable[[int, int, Mapping[str, float]], None]
FILE = "speeds.json"
N_CASES = 2
"""Made-up cases of each kind."""
LARGEST = 2
"""A made-up case has at most so many patches along an axis: what is read is the same from there on."""
TRIAL_STEPS = 1000
"""Length of the run that is tried; not so many steps are taken."""


@dataclass(frozen=True)
class Speed:
    """What a step of a method takes on this machine."""

    configuration: str
    method: str
    key: str
    """Hash of what it was measured of: plan, settings, device."""
    seconds_per_step: float
    memory_bytes: float
    """Peak: of the process on a CPU, of PyTorch's tensors on CUDA."""
    state_bytes: float
    """Weights with gradients and momentum, followers, memories: about what the checkpoints of a fold take on disk."""
    device: str
    threads: int


def speed_key(setup: RunSetup) -> str:
    """Hash of what decides a speed."""
    plan = setup.configuration.model_dump(mode="json")
    return content_hash([plan, setup.method.name, setup.settings.model_dump(mode="json"), setup.device, N_CASES])


def measure_all(setups: Sequence[RunSetup], path: Path, on_done: OnMeasured | None = None) -> list[Speed]:
    """Speeds of all setups, in their order; what was measured before is read, what is new is kept.

    Each is measured in a process of its own, so that neither its memory nor its threads stay.

    Args:
        setups: One per run.
        path: Of the kept figures.
        on_done: Called with (done, total, {}).
    """
    kept = {speed.key: speed for speed in read_speeds(path)}
    for number, setup in enumerate(setups, start=1):
        if speed_key(setup) not in kept:
            logger.info("measuring a step of %s, %s", setup.request.configuration, setup.method.name)
            spawned = multiprocessing.get_context("spawn")
            with ProcessPoolExecutor(1, mp_context=spawned) as pool:
                speed = pool.submit(measure_request, setup.request).result()
            kept[speed.key] = speed
            write_speeds(path, list(kept.values()))
        if on_done is not None:
            on_done(number, len(setups), {})
    return [kept[speed_key(setup)] for setup in setups]


def read_speeds(path: Path) -> list[Speed]:
    """What was measured before."""
    return [Speed(**entry) for entry in read_json(path)["speeds"]] if path.is_file() else []


def write_speeds(path: Path, speeds: Sequence[Speed]) -> None:
    """Keeps what was measured."""
    write_json(path, {"speeds": [asdict(speed) for speed in speeds]})


def measure_request(request: TrainRequest) -> Speed:
    """Resolves a request and measures it."""
    return measure(resolve(request))


def measure(setup: RunSetup) -> Speed:
    """Trains a few steps on made-up cases of the first fold, and throws everything away."""
    workers = default_workers(setup.device) if setup.request.num_workers is None else setup.request.num_workers
    share_cores(setup.device, workers)
    fold = next(iter(setup.folds))
    with TemporaryDirectory(prefix="autossl_speed_") as scratch:
        made_up = _MadeUp(setup, fold, Path(scratch))
        source = replace(made_up.source(), num_workers=workers, pin_memory=setup.device.startswith("cuda"))
        method = setup.method(setup.job(fold, TRIAL_STEPS), setup.settings)
        place_parts(method.parts, setup.device)
        options = loop_options(setup, fold, TRIAL_STEPS)
        seconds = seconds_per_step(method, source, options, blank_pseudo_labels(source))
    return Speed(
        configuration=setup.request.configuration,
        method=setup.method.name,
        key=speed_key(setup),
        seconds_per_step=seconds,
        memory_bytes=peak_memory_mb(setup.device) * 2**20,
        state_bytes=float(state_bytes(method.parts)),
        device=setup.device,
        threads=torch.get_num_threads(),
    )


class _MadeUp:
    """Cases of the plan's channels and classes with noise in them."""

    def __init__(self, setup: RunSetup, fold: str, folder: Path) -> None:
        self._setup, self._fold, self._folder = setup, fold, folder
        self._store = CaseStore(folder / "data")
        self._generator = np.random.default_rng(0)

    def source(self) -> FoldSource:
        """Of the fold's first cases, whose files are made up."""
        setup, streams = self._setup, self._setup.streams(self._fold)
        shape, schema = made_up_shape(setup), setup.schema
        labeled, unlabeled = streams.labeled[:N_CASES], streams.unlabeled[:N_CASES]
        for name in [case.id for case in labeled] + [case.id for case in unlabeled]:
            channels = setup.configuration.n_channels
            image = self._generator.standard_normal((channels, *shape), dtype=np.float32)
            write_array(self._store.image_path(name), image, sync=False)
            write_array(self._store.nonzero_path(name), np.ones(shape, dtype=bool), sync=False)
        for case in labeled:
            label = made_up_label(shape, schema)
            located = {name: np.argwhere(mask)[::7] for name, mask in schema.class_masks(label).items()}
            self._store.write_label(case.id, label, located)
        made = Streams(
            labeled=tuple(
                replace(
                    case,
                    image=self._store.image_path(case.id),
                    label=self._store.label_path(case.id),
                    locations=self._store.locations_path(case.id),
                    nonzero=case.nonzero and self._store.nonzero_path(case.id),
                )
                for case in labeled
            ),
            unlabeled=tuple(
                replace(
                    case,
                    image=self._store.image_path(case.id),
                    nonzero=case.nonzero and self._store.nonzero_path(case.id),
                )
                for case in unlabeled
            ),
        )
        distance = setup.method.needs.signed_distance
        return FoldSource(
            made, setup.configuration, schema, seed=0, store_folder=self._folder / "stores", signed_distance=distance
        )


def made_up_shape(setup: RunSetup) -> tuple[int, int, int]:
    """Voxels of a made-up case: those of the median case, at most so many patches along an axis."""
    median = median_case_shape(setup.plans, setup.configuration)
    patch = (1, *setup.configuration.patch_size)[-3:]
    z, y, x = (max(1, min(round(size), LARGEST * edge)) for size, edge in zip(median, patch, strict=True))
    return z, y, x


def made_up_label(shape: tuple[int, int, int], schema: LabelSchema) -> npt.NDArray[np.int16]:
    """Nested boxes, one value after the other towards the middle; each class occurs where there is room."""
    label = np.zeros(shape, dtype=np.int16)
    values = [value for value in schema.values if value not in (0, schema.ignore_label)]
    for number, value in enumerate(values, start=1):
        share = number / (2 * len(values) + 2)
        box = tuple(slice(int(size * share), max(int(size * share) + 1, int(size * (1 - share)))) for size in shape)
        label[box] = value
    return label
