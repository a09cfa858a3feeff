"""What predicts a case: one run, or several whose probabilities are averaged."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from autossl.data.image_io import LoadedImage, read_image
from autossl.data.integrity import check_finite
from autossl.data.labels import LabelSchema
from autossl.data.prepared import PreparedCase
from autossl.data.probabilities import ROWS_AT_ONCE, STEPS, labels_of, quantize
from autossl.data.problems import InvalidInput, Problem
from autossl.data.workspace import Workspace
from autossl.inference.backends import Backend, on_backend
from autossl.inference.inference_plan import InferencePlan
from autossl.inference.model_folder import TrainedModel, read_model
from autossl.inference.predictor import Predictor, Window
from autossl.inference.preprocessed import OnShare, predict_image
from autossl.inference.restore import Restored, Wanted
from autossl.inference.uncertainty import normalized_entropy, pairwise_disagreement
from autossl.networks.prediction import Activation
from autossl.preprocessing.prepare import prepare_case

logger = logging.getLogger(__name__)

AS_CHOSEN = (
    "choice, verdict and postprocessing are those of the shorter run; autossl_run makes them anew, or "
    "autossl_find_best_configuration and autossl_find_postprocessing"
)


@dataclass(frozen=True)
class FinalModel:
    """Runs that predict together. All have the same labels, channels, orientation and file ending."""

    members: tuple[TrainedModel, ...]

    @property
    def first(self) -> TrainedModel:
        """Speaks for all in what they share."""
        return self.members[0]

    @property
    def n_voters(self) -> int:
        """Whose disagreement is measured: the folds of a single run, or the members."""
        return len(self.members) if len(self.members) > 1 else len(self.first.folds)

    def modality(self, name: str) -> tuple[int, ...]:
        """Numbers of the channels of a modality from which every member predicts alone.

        Raises:
            InvalidInput: as `TrainedModel.modality`.
        """
        channels = [member.modality(name) for member in self.members]
        return channels[0]

    def separate_modalities(self) -> list[frozenset[int]]:
        """Sets of channels from which every member predicts alone."""
        others = [set(member.separate_modalities()) for member in self.members[1:]]
        return [found for found in self.first.separate_modalities() if all(found in other for other in others)]

    def load(
        self,
        device: str,
        mirroring: bool = True,
        step_size: float = 0.5,
        channels: tuple[int, ...] | None = None,
        backend: str = "torch",
    ) -> LoadedModel:
        """With all networks on the device.

        Args:
            device: where to predict.
            mirroring: over the axes of each member's plan.
            step_size: of the window.
            channels: of the modality to predict from alone; None: all.
            backend: what computes the networks, one of `BACKENDS`.

        Raises:
            InvalidInput: as `TrainedModel.load_predictor` and `on_backend`.
        """
        windows = [Window.of(member.plan, mirroring, step_size) for member in self.members]
        pairs = zip(self.members, windows, strict=True)
        predictors = [member.load_predictor(window, device, channels) for member, window in pairs]
        return LoadedModel(self, *on_backend(predictors, backend, self.first.plan.n_channels), channels)


@dataclass(frozen=True)
class LoadedModel:
    """A final model ready to predict."""

    model: FinalModel
    predictors: tuple[Predictor, ...]
    backend: Backend = "torch"
    """What computes the networks."""
    channels: tuple[int, ...] | None = None
    """Of the modality that is there; None: all."""

    def prepare(self, case: str, files: tuple[Path, ...]) -> tuple[PreparedCase, ...]:
        """Reads and preprocesses a case, once per member; members that are planned alike share the arrays.

        Raises:
            InvalidInput: naming the case.
        """
        first = self.model.first
        try:
            image = read_image(files, first.plans.orientation)
            n_channels = first.plan.n_channels if self.channels is None else len(self.channels)
            if len(image.array) != n_channels:
                found, fix = f"{len(image.array)} channels", "give images as the model was trained on"
                raise InvalidInput(Problem(found, f"{n_channels}", fix, file=files[0]))
            problems = check_finite(image.array, files)
            if problems:
                raise InvalidInput(problems)
            if self.channels is not None:
                image = _with_empty_channels(image, self.channels, first.plan.n_channels)
            made: dict[tuple[str, str], PreparedCase] = {}
            for member in self.model.members:
                key = (member.plans.hash(), member.run.configuration)
                if key not in made:
                    made[key] = prepare_case(image, None, member.plans, member.run.configuration)
            return tuple(made[member.plans.hash(), member.run.configuration] for member in self.model.members)
        except InvalidInput as error:
            raise InvalidInput([replace(problem, case=case) for problem in error.problems]) from error

    def predict(self, prepared: tuple[PreparedCase, ...], wanted: Wanted, on_share: OnShare) -> Restored:
        """Arrays in the oriented image's grid; one case of `prepare`."""
        schema, n_members = self.model.first.schema, len(self.predictors)
        if n_members == 1:
            return predict_image(
                self.predictors[0], prepared[0].image, prepared[0].properties, schema, wanted, on_share
            )
        predictions = (
            predict_image(
                p, case.image, case.properties, schema, Wanted(probabilities=True), _part(on_share, k, n_members)
            )
            for k, (p, case) in enumerate(zip(self.predictors, prepared, strict=True))
        )
        return combine(predictions, schema, wanted)


def planned_model(workspace: Workspace, plan: InferencePlan, path: Path | None = None) -> FinalModel:
    """The members of an inference plan.

    Args:
        workspace: whose results/ holds the runs.
        plan: which runs and folds.
        path: of the plan, for messages.

    Raises:
        InvalidInput: as `read_model`, or the members do not fit together.
    """
    members = tuple(read_model(workspace.results / member.run, member.folds) for member in plan.members)
    first = members[0]
    problems = []
    for other in members[1:]:
        facts = {
            "labels": (first.schema, other.schema),
            "channels": (first.description.n_channels, other.description.n_channels),
            "orientation": (first.plans.orientation, other.plans.orientation),
            "file ending": (first.description.file_ending, other.description.file_ending),
        }
        differing = [name for name, (one, two) in facts.items() if one != two]
        if differing:
            found = f"{other.folder.name} has another {', '.join(differing)} than {first.folder.name}"
            fix = "make the inference plan again from runs of one dataset"
            problems.append(Problem(found, "members with the same", fix, file=path))
    if problems:
        raise InvalidInput(problems)
    for chosen, member in zip(plan.members, members, strict=True):
        if chosen.total_steps not in (None, member.run.total_steps):
            steps = f"from {chosen.total_steps} to {member.run.total_steps} steps"
            logger.warning("%s was extended %s after it was chosen: %s", chosen.name, steps, AS_CHOSEN)
    return FinalModel(members)


def combine(predictions: Iterable[Restored], schema: LabelSchema, wanted: Wanted) -> Restored:
    """The mean of several members' probabilities, and the label map that it decides.

    The members' probabilities are taken as bytes, which is what an ensemble was scored with out of fold. Memory holds
    two bytes per output and voxel, and one member's results.

    Args:
        predictions: per member, with `probabilities`; taken one after the other.
        schema: of all of them.
        wanted: uncertainty: the entropy of the mean, and the disagreement of the members' label maps.
    """
    total: npt.NDArray[np.uint16] | None = None
    label_maps = []
    n_members = 0
    for restored in predictions:
        if restored.probabilities is None:
            raise ValueError("a member without probabilities")
        n_members += 1
        if total is None:
            total = restored.probabilities.astype(np.uint16)
        else:
            total += restored.probabilities
        if wanted.uncertainty:
            label_maps.append(restored.label_map)
    if total is None:
        raise ValueError("an ensemble needs members")
    result = _decided(total, n_members, schema, wanted)
    if len(label_maps) < 2:
        return result
    votes = torch.from_numpy(np.stack(label_maps).astype(np.int32))
    return replace(result, disagreement=pairwise_disagreement(votes).numpy())


def _decided(total: npt.NDArray[np.uint16], n_members: int, schema: LabelSchema, wanted: Wanted) -> Restored:
    """From the sum of bytes [K,z,y,x], few slices at a time."""
    label_map = np.empty(total.shape[1:], dtype=schema.dtype)
    probabilities = np.empty(total.shape, dtype=np.uint8) if wanted.probabilities else None
    entropy = np.empty(total.shape[1:], dtype=np.float32) if wanted.uncertainty else None
    for start in range(0, total.shape[1], ROWS_AT_ONCE):
        rows = slice(start, start + ROWS_AT_ONCE)
        mean = total[:, rows].astype(np.float32) / np.float32(STEPS * n_members)
        label_map[rows] = labels_of(mean, schema)
        if probabilities is not None:
            probabilities[:, rows] = quantize(mean, keep_largest=not schema.has_regions)
        if entropy is not None:
            activation: Activation = "sigmoid" if schema.has_regions else "softmax"
            entropy[rows] = normalized_entropy(torch.from_numpy(mean), activation).numpy()
    return Restored(label_map, probabilities, entropy)


def _part(on_share: OnShare, number: int, total: int) -> Callable[[float], None]:
    """Tells the share of the whole from that of one of `total` parts."""
    return lambda share: on_share((number + share) / total)


def _with_empty_channels(image: LoadedImage, channels: tuple[int, ...], n_channels: int) -> LoadedImage:
    """The image with its channels in their places and zeros in the others, which no network will look at."""
    array: npt.NDArray[Any] = np.zeros((n_channels, *image.array.shape[1:]), dtype=np.float32)
    array[list(channels)] = image.array
    return replace(image, array=array)
