"""The sliding-window predictor: a preprocessed image in, logits out, row by row so that memory stays bounded.

Weights of all folds are loaded once. A tile's logits are averaged over mirrored views and folds, blended with its
neighbors' by Gaussian weights in float32, and a row of the volume leaves as soon as no tile can touch it any more.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional

from autossl.data.labels import LabelSchema
from autossl.data.problems import InvalidInput, Problem
from autossl.inference.tiles import TileGroup, tile_groups, tile_weights
from autossl.networks.cpu import use_onednn
from autossl.networks.prediction import Member, PredictionSpec, build_member, logits_of, member_parts, probabilities_of
from autossl.planners.plans import ConfigurationPlan

logger = logging.getLogger(__name__)

Network = Callable[[Tensor], Tensor]
"""[N,c,*tile] → logits [N,K,*tile]. The seam for other backends: a predictor needs nothing else of a network."""

VOXELS_AT_ONCE = {"cpu": 1 << 17, "cuda": 1 << 22}
"""Tile voxels per forward pass; on the CPU larger batches are no faster (measured: 1 and 2 tiles of 90 000 voxels)."""
MAX_TILES_AT_ONCE = 128


@dataclass(frozen=True)
class Window:
    """How a volume is tiled. `patch_size` has two entries (a 2D network, slice by slice) or three."""

    patch_size: tuple[int, ...]
    mirror_axes: tuple[int, ...] = ()
    """Axes of the patch; every combination of them is a view. Empty: no mirroring."""
    step_size: float = 0.5
    """Share of the patch between tiles, above 0 and at most 1."""
    tiles_at_once: int | None = None
    """Tiles per forward pass; None: by the device."""

    @classmethod
    def of(cls, plan: ConfigurationPlan, mirror: bool = True, step_size: float = 0.5) -> Window:
        """The plan's patch, and its mirror axes where asked for."""
        return cls(plan.patch_size, plan.mirror_axes if mirror else (), step_size)

    def __post_init__(self) -> None:
        if not 0 < self.step_size <= 1:
            raise InvalidInput(Problem(f"step size {self.step_size}", "above 0 and at most 1", "choose 0.5"))

    @property
    def tile_zyx(self) -> tuple[int, int, int]:
        """The patch in three dimensions; 2D patches are one slice thick."""
        z, y, x = (1, *self.patch_size)[-3:]
        return z, y, x

    def batch_for(self, device: torch.device) -> int:
        """Tiles per forward pass on this device."""
        if self.tiles_at_once is not None:
            return max(1, self.tiles_at_once)
        voxels = VOXELS_AT_ONCE.get(device.type, VOXELS_AT_ONCE["cpu"])
        return min(MAX_TILES_AT_ONCE, max(1, voxels // int(np.prod(self.patch_size))))


@dataclass(frozen=True)
class Slab:
    """Finished rows of a volume: logits [F,K,n,y,x] from row `start` on. F is 1 where folds were averaged."""

    start: int
    logits: Tensor


class Predictor:
    """Networks on a device, ready to predict preprocessed images in the plan's (transposed) axis order."""

    def __init__(
        self,
        spec: PredictionSpec,
        folds: Sequence[Sequence[Network]],
        n_outputs: int,
        window: Window,
        device: torch.device | str = "cpu",
        members: Sequence[Sequence[Member]] | None = None,
    ) -> None:
        """Takes networks as they are; `from_state_dicts` builds them.

        Args:
            spec: how members are combined.
            folds: per fold one network per member of the spec, in its order, on `device`.
            n_outputs: channels of logits.
            window: tiling and mirroring.
            device: where tiles are predicted and blended.
            members: per fold, where they are not the spec's.
        """
        self.spec = spec
        self.folds = tuple(tuple(networks) for networks in folds)
        self.members = [spec.members] * len(self.folds) if members is None else members
        self.n_outputs = n_outputs
        self.window = window
        self.device = torch.device(device)
        axes = [axis + 2 for axis in window.mirror_axes]
        self._views = [flip for n in range(len(axes) + 1) for flip in combinations(axes, n)]
        self._weights = torch.from_numpy(tile_weights(window.patch_size).copy()).to(self.device)
        self._constant: tuple[tuple[Any, ...], Tensor] | None = None

    @classmethod
    def from_state_dicts(
        cls,
        spec: PredictionSpec | Sequence[PredictionSpec],
        folds: Sequence[Mapping[str, Mapping[str, Any]]],
        plan: ConfigurationPlan,
        schema: LabelSchema,
        window: Window | None = None,
        device: torch.device | str = "cpu",
    ) -> Predictor:
        """A predictor with networks of its own.

        Args:
            spec: which members, how combined; or one for each fold, where these differ in their members alone.
            folds: per fold the weights by network name; they are copied, so that networks in training stay as they are.
            plan: channels and patch.
            schema: outputs.
            window: None: the plan's patch, mirrored over the plan's axes, half a patch between tiles.
            device: where to predict.

        Raises:
            InvalidInput: spec, plan, labels and weights do not belong together.
        """
        specs = [spec] * len(folds) if isinstance(spec, PredictionSpec) else list(spec)
        for one in specs:
            _check_belongs(one, plan, schema)
        networks = [
            [_loaded(one, index, states, plan, schema).to(device) for index in range(len(one.members))]
            for one, states in zip(specs, folds, strict=True)
        ]
        if torch.device(device).type == "cpu":
            networks = [[use_onednn(network) for network in members] for members in networks]
        members = [one.members for one in specs]
        return cls(specs[0], networks, schema.n_outputs, window or Window.of(plan), device, members)

    def logits(self, image: Tensor | npt.NDArray[np.floating[Any]]) -> Tensor:
        """Logits [K,z,y,x] of a preprocessed image [C,z,y,x], averaged over folds; float32 on the CPU."""
        result = torch.empty((self.n_outputs, *image.shape[1:]), dtype=torch.float32)
        for slab in self.slabs(image):
            result[:, slab.start : slab.start + slab.logits.shape[2]] = slab.logits[0].cpu()
        return result

    def slabs(self, image: Tensor | npt.NDArray[np.floating[Any]], per_fold: bool = False) -> Iterator[Slab]:
        """Finished rows in ascending order. A slab's tensor is reused: take what you need before the next one.

        Args:
            image: preprocessed [C,z,y,x]; padded with 0 around the middle where it is smaller than the patch.
            per_fold: True: keep the folds apart (memory grows with them), False: average them.

        Raises:
            InvalidInput: the network's output is not finite.
        """
        volume = torch.as_tensor(image, dtype=torch.float32)
        tile = self.window.tile_zyx
        before = [max(0, edge - n) // 2 for n, edge in zip(volume.shape[1:], tile, strict=True)]
        cuts = [slice(b, b + n) for b, n in zip(before, volume.shape[1:], strict=True)]
        volume = _padded(volume, tile, before)
        at_once = self.window.batch_for(self.device)
        groups = list(tile_groups(volume.shape[1:], tile, self.window.step_size, at_once))
        blend = _Blend(self, groups, volume.shape[2:], len(self.folds) if per_fold else 1)
        for group in groups:
            for first in range(0, len(group.starts), at_once):
                starts = group.starts[first : first + at_once]
                for start, logits in zip(starts, self._tiles(volume, starts, per_fold), strict=True):
                    blend.add(start, logits)
            low, high = max(blend.base, cuts[0].start), min(group.finished, cuts[0].stop)
            finished = blend.finish(group.finished)
            if high > low:
                rows = slice(low - blend.base, high - blend.base)
                yield Slab(low - cuts[0].start, finished[:, :, rows, cuts[1], cuts[2]])
            if group is not groups[-1]:
                blend.advance(group.finished)

    def _tiles(self, volume: Tensor, starts: Sequence[tuple[int, int, int]], per_fold: bool) -> Tensor:
        """Logits [N,F,K,z,y,x] of the tiles at `starts`."""
        tile = self.window.tile_zyx
        cut = [volume[(slice(None), *(slice(s, s + n) for s, n in zip(start, tile, strict=True)))] for start in starts]
        tiles = torch.stack(cut)
        if len(self.window.patch_size) == 2:
            tiles = tiles.squeeze(2)
        logits = self._known_or_new(tiles.to(self.device), per_fold)
        return logits.unsqueeze(3) if len(self.window.patch_size) == 2 else logits

    def _known_or_new(self, tiles: Tensor, per_fold: bool) -> Tensor:
        """[N,F,K,*tile]. The last tile of one value per channel is kept: the next like it has the very same logits.

        Only for tiles that are predicted alone: among others, a tile's last digits may depend on how many they are.
        """
        voxels = tiles.flatten(2)
        if len(tiles) > 1 or not torch.equal(voxels.amin(2), voxels.amax(2)):
            return self._all_folds(tiles, per_fold)
        values = (per_fold, *voxels[0, :, 0].tolist())
        if self._constant is None or self._constant[0] != values:
            self._constant = (values, self._all_folds(tiles, per_fold))
        return self._constant[1]

    @torch.inference_mode()
    def _all_folds(self, tiles: Tensor, per_fold: bool) -> Tensor:
        """[N,F,K,*tile]; in mixed precision on CUDA, again in float32 where that overflows."""
        try:
            logits = self._stacked(tiles, per_fold, mixed=self.device.type == "cuda")
            if not torch.isfinite(logits.sum()) and self.device.type == "cuda":
                logits = self._stacked(tiles, per_fold, mixed=False)
        except torch.OutOfMemoryError:
            if len(tiles) == 1:
                raise
            logger.warning("%d tiles do not fit into the device's memory; halving", len(tiles))
            half = len(tiles) // 2
            return torch.cat([self._all_folds(part, per_fold) for part in (tiles[:half], tiles[half:])])
        if not torch.isfinite(logits.sum()):
            raise InvalidInput(
                Problem(
                    "the network's output is not finite",
                    "finite intensities and weights",
                    "check the image for NaN and infinite voxels, and that the training ended well",
                )
            )
        return logits

    def _stacked(self, tiles: Tensor, per_fold: bool, mixed: bool) -> Tensor:
        with torch.autocast(self.device.type) if mixed else nullcontext():
            pairs = zip(self.members, self.folds, strict=True)
            folds = [self._one_fold(tiles, members, networks) for members, networks in pairs]
        if per_fold:
            return torch.stack(folds, 1)
        total = folds[0]
        for logits in folds[1:]:
            total += logits
        return (total / len(folds) if len(folds) > 1 else total).unsqueeze(1)

    def _one_fold(self, tiles: Tensor, members: Sequence[Member], networks: Sequence[Network]) -> Tensor:
        """Logits [N,K,*tile] of one fold: mean over views (single), or the logarithm of the mean probability."""
        single = self.spec.combine == "single"
        total: Tensor | None = None
        for axes in self._views:
            view = tiles.flip(axes) if axes else tiles
            for member, network in zip(members, networks, strict=True):
                logits = network(view if member.channels is None else view[:, list(member.channels)])
                value = logits.float() if single else probabilities_of(logits, self.spec.activation)
                value = value.flip(axes) if axes else value
                total = value if total is None else total + value
        if total is None:
            raise ValueError("a predictor needs at least one network")
        mean = total / (len(self._views) * len(networks))
        return mean if single else logits_of(mean, self.spec.activation)


class _Blend:
    """Weighted sums of the rows that tiles still touch: [F,K,rows,y,x], as many rows as one group of tiles spans."""

    def __init__(self, predictor: Predictor, groups: Sequence[TileGroup], plane: Sequence[int], n_folds: int) -> None:
        spans = [group.end for group in groups]
        bases = [0, *(group.finished for group in groups[:-1])]
        rows = max(end - base for base, end in zip(bases, spans, strict=True))
        shape = (n_folds, predictor.n_outputs, rows, *plane)
        self.base = 0
        self._gaussian = predictor._weights.reshape(predictor.window.tile_zyx)
        try:
            self._sums = torch.zeros(shape, device=predictor.device)
        except torch.OutOfMemoryError:
            logger.warning("the blended logits do not fit into the device's memory; they stay in main memory")
            self._sums = torch.zeros(shape)
            self._gaussian = self._gaussian.cpu()
        self._weights = torch.zeros(shape[2:], device=self._sums.device)

    def add(self, start: Sequence[int], logits: Tensor) -> None:
        """Adds a tile's logits [F,K,z,y,x]."""
        first = (start[0] - self.base, *start[1:])
        z, y, x = (slice(s, s + n) for s, n in zip(first, self._gaussian.shape, strict=True))
        self._sums[:, :, z, y, x].addcmul_(logits.to(self._sums.device), self._gaussian)
        self._weights[z, y, x] += self._gaussian

    def finish(self, end: int) -> Tensor:
        """Divides the rows below `end` by their weights and gives all rows that are held."""
        n = end - self.base
        self._sums[:, :, :n] /= self._weights[:n]
        return self._sums

    def advance(self, end: int) -> None:
        """Drops the rows below `end`; the rest moves to the front, class by class to save memory."""
        n = end - self.base
        kept = self._weights.shape[0] - n
        for block in (*self._sums.flatten(0, 1), self._weights):
            if kept:
                block[:kept] = block[n:].clone()
            block[kept:] = 0
        self.base = end


def _padded(volume: Tensor, tile: Sequence[int], before: Sequence[int]) -> Tensor:
    missing = [max(0, edge - n) for n, edge in zip(volume.shape[1:], tile, strict=True)]
    if not any(missing):
        return volume
    pairs = [(b, m - b) for b, m in zip(before, missing, strict=True)]
    return functional.pad(volume, [n for pair in reversed(pairs) for n in pair])


def _check_belongs(spec: PredictionSpec, plan: ConfigurationPlan, schema: LabelSchema) -> None:
    problems = []
    if spec.members[0].architecture.dims != plan.dims:
        found = f"networks of {spec.members[0].architecture.dims} dimensions"
        problems.append(
            Problem(found, f"{plan.dims} as the plan's patch {plan.patch_size}", "use the checkpoint's own plans.json")
        )
    if (spec.activation == "sigmoid") != schema.has_regions:
        wanted = "sigmoid for regions" if schema.has_regions else "softmax or dirichlet for labels"
        problems.append(
            Problem(f"activation {spec.activation}", wanted, "use the dataset.json that the model was trained with")
        )
    if problems:
        raise InvalidInput(problems)


def _loaded(
    spec: PredictionSpec,
    index: int,
    states: Mapping[str, Mapping[str, Any]],
    plan: ConfigurationPlan,
    schema: LabelSchema,
) -> torch.nn.Module:
    """The member's network with its weights."""
    member = spec.members[index]
    missing = [name for name in member.parts if name not in states]
    if missing:
        raise InvalidInput(
            Problem(
                f"no weights for network '{missing[0]}'; there are {', '.join(sorted(states)) or 'none'}",
                "weights for every network that predicts",
                "use a checkpoint of a finished training",
            )
        )
    network = build_member(member, plan.n_channels, schema.n_outputs, spec.activation)
    for name, module in member_parts(member, network).items():
        _load_weights(module, name, states[name], plan, schema)
    return network


def _load_weights(
    module: torch.nn.Module, name: str, weights: Mapping[str, Any], plan: ConfigurationPlan, schema: LabelSchema
) -> None:
    """Into the module, whatever wrapping the weights' names still tell of."""
    state = dict(weights)
    for prefix in ("module.", "_orig_mod."):
        state = {key.removeprefix(prefix): value for key, value in state.items()}
    try:
        module.load_state_dict(state)
    except RuntimeError as error:
        lines = [line.strip() for line in str(error).splitlines()]
        raise InvalidInput(
            Problem(
                f"the weights of '{name}' do not fit its network ({'; '.join(lines[1:3]) or lines[0]})",
                f"weights for {plan.n_channels} channels and {schema.n_outputs} outputs",
                "use the plans.json and dataset.json that the checkpoint was trained with",
            )
        ) from error
