"""The two streams of a run: which cases may be seen, and the batch of a step as a pure function of (seed, rank, step).

An `UnlabeledCase` holds no label path at all, so no code down here can read what a run may not see. Every draw derives
from `derive_seed(seed, rank, stream, step, sample, …)`: where the patch lies, its geometry, and each view's intensity
have seeds of their own, so that asking for another view or another stream changes nothing else.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from autossl.data.labels import LabelSchema
from autossl.data.prepared import ANNOTATED
from autossl.data.problems import InvalidInput, Problem, nearest
from autossl.planners.plans import ConfigurationPlan
from autossl.trainers.augmentation import Augmentation, Geometry, PatchArrays, default_augmentation, mask_outside
from autossl.trainers.base import Batch, BatchRequest, StreamBatch, StreamRequest, derive_seed
from autossl.trainers.batch_workers import BatchIterator, LoadingError, batch_iterator
from autossl.trainers.components.geometry import signed_distance
from autossl.trainers.patch_reader import CaseReader
from autossl.trainers.sampling import (
    Locations,
    Place,
    choose_voxel,
    is_forced_foreground,
    patch_sizes,
    place_around,
    uniform_place,
)
from autossl.trainers.target_map import TargetMap

__all__ = [
    "BatchIterator",
    "BatchMaker",
    "LabeledCase",
    "LoadingError",
    "Streams",
    "UnlabeledCase",
    "batch_iterator",
]


ANISOTROPY = 3
"""Spacings that differ by more make distances in plane only (COMMON.md, rule 12)."""


@dataclass(frozen=True)
class LabeledCase:
    """Files of a preprocessed case whose label the run may see."""

    id: str
    image: Path
    label: Path
    locations: Path
    nonzero: Path | None = None
    attributes: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class UnlabeledCase:
    """Files of a preprocessed case without label; `stores` maps a store's name to (label map, confidence).

    A store that does not use the case has no entry; `store_weights` says what its patches count, if not 1.
    """

    id: str
    image: Path
    nonzero: Path | None = None
    attributes: Mapping[str, str] = field(default_factory=dict)
    stores: Mapping[str, tuple[Path, Path]] = field(default_factory=dict)
    store_weights: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Streams:
    """All cases that a run trains on."""

    labeled: tuple[LabeledCase, ...]
    unlabeled: tuple[UnlabeledCase, ...] = ()
    filled: frozenset[str] = frozenset()
    """Pseudo-label stores that were made, though they may use no case at all."""


@dataclass
class _Sample:
    """One patch, ready to be stacked: per view, or per geometry (then repeated for the views that share it)."""

    case: LabeledCase | UnlabeledCase
    center: tuple[float, float, float]
    views: list[Tensor] = field(default_factory=list)
    valids: list[Tensor] = field(default_factory=list)
    targets: list[Tensor] = field(default_factory=list)
    confidences: list[Tensor] = field(default_factory=list)


class BatchMaker:
    """Makes the batch of any step. Picklable; files are opened on first use in each process.

    Args:
        streams: cases that may be seen.
        configuration: patch size, mirror axes, masked channels, spacing.
        schema: what label values become in targets.
        seed: of the run.
        rank: of the process in distributed training; ranks draw different patches.
        augment: False: patches as they are, at their drawn places.
        signed_distance: also make signed distance maps of the labeled targets.
    """

    def __init__(
        self,
        streams: Streams,
        configuration: ConfigurationPlan,
        schema: LabelSchema,
        seed: int,
        rank: int = 0,
        augment: bool = True,
        signed_distance: bool = False,
    ) -> None:
        self.streams = streams
        self.configuration = configuration
        self.schema = schema
        self.seed = seed
        self.rank = rank
        self.signed_distance = signed_distance
        self._augmentation: Augmentation | None = default_augmentation(configuration) if augment else None
        self._sizes = patch_sizes(configuration.patch_size, room_for_rotation=augment)
        self._targets = TargetMap(schema)
        self._reader = CaseReader()

    def make(self, step: int, request: BatchRequest) -> Batch:
        """The batch of a step; depends on nothing but seed, rank, step and request.

        Raises:
            InvalidInput: a file cannot be read; a requested pseudo-label store does not exist.
            ValueError: the request makes no sense for the stream.
        """
        _check("labeled", request.labeled)
        _check("unlabeled", request.unlabeled)
        if request.labeled.count and not self.streams.labeled:
            raise InvalidInput(
                Problem("no labeled training case", "at least one", "choose another fold, split or label budget")
            )
        with _single_thread():
            labeled = self._stream("labeled", self.streams.labeled, step, request.labeled)
            unlabeled, pool = None, self._pool(request.unlabeled)
            if request.unlabeled.count and pool:
                unlabeled = self._stream("unlabeled", pool, step, request.unlabeled)
        return Batch(labeled, unlabeled)

    def cases(self, step: int, request: BatchRequest) -> tuple[str, ...]:
        """Ids of the cases that the batch of a step is made of, as `make` draws them."""
        streams: tuple[tuple[str, Sequence[LabeledCase | UnlabeledCase], StreamRequest], ...] = (
            ("labeled", self.streams.labeled, request.labeled),
            ("unlabeled", self._pool(request.unlabeled), request.unlabeled),
        )
        return tuple(
            self._draw(name, pool, step, index)[0].id
            for name, pool, wanted in streams
            if pool
            for index in range(wanted.count)
        )

    # ------------------------------------------------------------------------------------------------- one stream

    def _pool(self, request: StreamRequest) -> Sequence[UnlabeledCase]:
        """The unlabeled cases; those that the store uses, where one is asked for and was made."""
        store = request.store
        if request.includes_labeled:
            hidden = (UnlabeledCase(c.id, c.image, c.nonzero, c.attributes) for c in self.streams.labeled)
            return (*hidden, *self.streams.unlabeled)
        used = [case for case in self.streams.unlabeled if store in case.stores]
        return used if used or store in self.streams.filled else self.streams.unlabeled

    def _stream(
        self, name: str, cases: Sequence[LabeledCase | UnlabeledCase], step: int, request: StreamRequest
    ) -> StreamBatch:
        samples = []
        for index in range(request.count):
            case, rng, seeds = self._draw(name, cases, step, index)
            try:
                samples.append(self._sample(case, rng, seeds, index, request))
            except InvalidInput:
                raise
            except Exception as error:
                raise LoadingError(f"patch {index} of the {name} stream, case {case.id}, could not be made") from error
        return self._stack(name, samples, request)

    def _draw(
        self, name: str, cases: Sequence[LabeledCase | UnlabeledCase], step: int, index: int
    ) -> tuple[LabeledCase | UnlabeledCase, np.random.Generator, _Seeds]:
        """The case of a patch, and what draws the rest of it."""
        seeds = _Seeds((self.seed, self.rank, name, step, index))
        rng = np.random.default_rng(seeds.of("place"))
        return cases[int(rng.integers(len(cases)))], rng, seeds

    def _sample(
        self,
        case: LabeledCase | UnlabeledCase,
        rng: np.random.Generator,
        seeds: _Seeds,
        index: int,
        request: StreamRequest,
    ) -> _Sample:
        shape = self._reader.shape(case.image)[1:]
        place = self._place(case, rng, shape, index, request)
        sample = _Sample(case, place.center(shape))
        patch: PatchArrays | None = None
        for view in range(request.views):
            if patch is None or not request.shared_geometry:
                patch = self._moved(case, place, seeds.of("geometry", view), request)
                self._add_maps(sample, patch)
            sample.views.append(self._changed(patch, seeds.of("intensity", view)))
        return sample

    def _place(
        self,
        case: LabeledCase | UnlabeledCase,
        rng: np.random.Generator,
        shape: Sequence[int],
        index: int,
        request: StreamRequest,
    ) -> Place:
        """Where the patch lies, by the request's sampler."""
        forced = request.sampler != "uniform" and is_forced_foreground(index, request.count, float(rng.random()))
        voxel = None
        if isinstance(case, UnlabeledCase):
            if forced:
                label, confidence = _store_of(case, request.store)
                voxel = choose_voxel(rng, self._reader.locations_in_map(label, confidence, self.schema))
        elif forced or self.schema.ignore_label is not None:
            locations = self._reader.locations(case.locations)
            wanted: Locations = {name: found for name, found in locations.items() if (name != ANNOTATED) == forced}
            voxel = choose_voxel(rng, wanted)
            if voxel is None:
                voxel = choose_voxel(rng, locations)
        return uniform_place(rng, shape, self._sizes) if voxel is None else place_around(voxel, shape, self._sizes)

    # --------------------------------------------------------------------------------------------------- one patch

    def _moved(self, case: LabeledCase | UnlabeledCase, place: Place, seed: int, request: StreamRequest) -> PatchArrays:
        """The final patch after its geometry, intensities untouched."""
        store = request.store
        if self._augmentation is None:
            return self._read(case, place.final_start, place.sizes.final, store)
        geometric = self._augmentation.geometric
        drawn: Geometry = geometric.draw(seed)
        geometry = replace(drawn, flips=tuple(axis for axis in drawn.flips if axis not in request.unmirrored_axes))
        start, size = (
            (place.start, place.sizes.initial) if geometry.resamples else (place.final_start, place.sizes.final)
        )
        return geometric.apply(geometry, self._read(case, start, size, store))

    def _read(
        self, case: LabeledCase | UnlabeledCase, start: Sequence[int], size: Sequence[int], store: str | None
    ) -> PatchArrays:
        """A box of the case's arrays. Which maps there are depends on what kind of case it is."""
        box = np.s_[..., 0, :, :] if self.configuration.dims == 2 else np.s_[...]

        def read(path: Path) -> Tensor:
            return torch.from_numpy(self._reader.read(path, start, size)[box])

        maps, scalars = {}, {}
        if isinstance(case, LabeledCase):
            maps["label"] = read(case.label)
        else:
            maps["inside"] = _inside(self._reader.shape(case.image)[1:], start, size)[box]
            if store is not None:
                label, confidence = _store_of(case, store)
                maps["label"] = read(label)
                scalars["confidence"] = read(confidence).float() / 255
        if case.nonzero is not None and any(self.configuration.use_mask_for_norm):
            maps["nonzero"] = read(case.nonzero)
        return PatchArrays(read(case.image), maps, scalars)

    def _changed(self, patch: PatchArrays, seed: int) -> Tensor:
        """A view: the patch with the intensities of this seed."""
        if self._augmentation is None:
            return patch.image
        image = self._augmentation.intensity.apply(patch.image, seed)
        if "nonzero" in patch.maps:
            mask_outside(image, patch.maps["nonzero"], self.configuration.use_mask_for_norm)
        return image

    def _add_maps(self, sample: _Sample, patch: PatchArrays) -> None:
        if "inside" in patch.maps:
            sample.valids.append(patch.maps["inside"][None] != 0)
        else:
            sample.valids.append(self._targets.annotated(patch.maps["label"])[None])
        if "label" in patch.maps:
            sample.targets.append(self._targets.target(patch.maps["label"]))
        if "confidence" in patch.scalars:
            sample.confidences.append(patch.scalars["confidence"][None])

    # ---------------------------------------------------------------------------------------------------- stacking

    def _stack(self, name: str, samples: list[_Sample], request: StreamRequest) -> StreamBatch:
        patch, channels = self.configuration.patch_size, self.configuration.n_channels
        geometries = 1 if request.shared_geometry else request.views

        def stacked(parts: list[list[Tensor]], empty: Tensor, n: int) -> tuple[Tensor, ...]:
            made = [torch.stack([part[i] for part in parts]) if parts else empty for i in range(n)]
            return tuple(made * (request.views // n))

        no_maps = torch.empty((0, 1, *patch))
        is_labeled = name == "labeled"
        maps = confidences = None
        if is_labeled or request.store is not None:
            maps = stacked([s.targets for s in samples], self._targets.none(patch), geometries)
        weights = None
        if request.store is not None:
            confidences = stacked([s.confidences for s in samples], no_maps, geometries)
            weights = torch.tensor([_weight_of(s.case, request.store) for s in samples], dtype=torch.float32)
        return StreamBatch(
            views=stacked([s.views for s in samples], torch.empty((0, channels, *patch)), request.views),
            valids=stacked([s.valids for s in samples], no_maps.bool(), geometries),
            case_ids=tuple(s.case.id for s in samples),
            centers=torch.tensor([s.center for s in samples], dtype=torch.float32).reshape(-1, 3),
            targets=maps if is_labeled else None,
            pseudo_labels=None if is_labeled else maps,
            pseudo_confidences=confidences,
            pseudo_weights=weights,
            signed_distances=self._distances(maps[0]) if is_labeled and maps and self.signed_distance else None,
            attributes=tuple(s.case.attributes for s in samples),
            has_channel=torch.tensor([self._reader.has_channel(s.case.image) for s in samples]).reshape(-1, channels),
        )

    def _distances(self, targets: Tensor) -> Tensor:
        """Signed distance maps [B, F, *S] of stacked targets, one per foreground class or region."""
        masks = self._targets.foreground(targets).numpy()
        spacing = self.configuration.spacing
        flat = len(spacing) == 3 and max(spacing) / min(spacing) > ANISOTROPY
        made = np.empty(masks.shape, dtype=np.float32)
        for row in np.ndindex(masks.shape[:2]):
            made[row] = signed_distance(masks[row], spacing, "slice" if flat else "full")
        return torch.from_numpy(made)


# ------------------------------------------------------------------------------------------------------------ helpers


@dataclass(frozen=True)
class _Seeds:
    """Seeds of one sample, by what is drawn."""

    sample: tuple[int | str, ...]

    def of(self, *what: int | str) -> int:
        return derive_seed(*self.sample, *what)


def _check(stream: str, request: StreamRequest) -> None:
    samplers = {"labeled": ("foreground", "uniform"), "unlabeled": ("uniform", "pseudo_foreground")}[stream]
    if request.sampler not in samplers:
        raise ValueError(f"the {stream} stream has the samplers {samplers}, not {request.sampler!r}")
    if stream == "labeled" and request.store is not None:
        raise ValueError(f"the labeled stream has no pseudo-label stores, but '{request.store}' was requested")
    if request.includes_labeled and (stream == "labeled" or request.store is not None):
        raise ValueError("labeled cases can be included in the unlabeled stream only, and without a store")
    if request.sampler == "pseudo_foreground" and request.store is None:
        raise ValueError("the sampler pseudo_foreground needs the name of a pseudo-label store")
    if request.count < 0 or request.views < 1:
        raise ValueError(f"{request.count} patches with {request.views} views: expected at least 0 and 1")


def _store_of(case: UnlabeledCase, store: str | None) -> tuple[Path, Path]:
    if store not in case.stores:
        raise InvalidInput(
            Problem(
                f"no pseudo-labels '{store}'",
                f"one of {nearest(str(store), case.stores)}",
                "the method must have a refresh into this store before it requests it",
                case=case.id,
            )
        )
    return case.stores[str(store)]


def _weight_of(case: LabeledCase | UnlabeledCase, store: str) -> float:
    return case.store_weights.get(store, 1.0) if isinstance(case, UnlabeledCase) else 1.0


def _inside(shape: Sequence[int], start: Sequence[int], size: Sequence[int]) -> Tensor:
    """Uint8 box, 1 where it lies in a case of this shape."""
    box = torch.zeros(tuple(size), dtype=torch.uint8)
    box[tuple(slice(max(0, -s), max(0, n - s)) for s, n in zip(start, shape, strict=True))] = 1
    return box


@contextmanager
def _single_thread() -> Iterator[None]:
    """One torch thread, as in the workers: sums over several threads differ in the last bits."""
    threads = torch.get_num_threads()
    if threads == 1:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
