"""The numbers of a data set that planning starts from. Pure data, so that plans can be made without any image."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from autossl.data.image_io import orientation_for
from autossl.data.labels import LabelSchema
from autossl.data.problems import InvalidInput, Problem
from autossl.planners.budget import BudgetStatistics, budget_statistics
from autossl.planners.plans import IntensityProperties
from autossl.planners.spacing import FloatArray

if TYPE_CHECKING:
    from autossl.data.raw_dataset import DatasetDescription
    from autossl.planners.fingerprint import Fingerprint


@dataclass(frozen=True)
class DatasetFacts:
    """A data set as its fingerprint and its dataset.json describe it. Labeled cases decide sizes, as in nnU-Net."""

    dataset_name: str
    channel_names: tuple[str, ...]
    schema: LabelSchema
    orientation: Literal["RAS", "native"]
    file_ending: str
    spacings_zyx_mm: tuple[tuple[float, ...], ...]
    """Of the labeled cases."""
    shapes_zyx: tuple[tuple[int, ...], ...]
    """Of the labeled cases after the crop to non-zero, in the same order."""
    n_unlabeled: int
    n_labeled_patients: int
    median_relative_size_after_crop: float
    intensities: Mapping[str, IntensityProperties]
    """Of the labeled foreground, by channel number as text."""
    statistics: BudgetStatistics | None = None
    """What all labeled cases say about the classes; None: not measured."""

    def __post_init__(self) -> None:
        if not self.spacings_zyx_mm:
            raise InvalidInput(
                Problem(
                    f"{self.dataset_name} has no labeled case",
                    "at least one image in imagesTr with its label map in labelsTr",
                    "add labeled cases; plans are made from them",
                )
            )

    @property
    def n_labeled(self) -> int:
        """Labeled cases."""
        return len(self.spacings_zyx_mm)

    @property
    def n_cases(self) -> int:
        """Labeled and unlabeled cases."""
        return self.n_labeled + self.n_unlabeled

    @property
    def n_priced_outputs(self) -> int:
        """Output channels that nnU-Net's price assumes: every declared name, background and ignore included."""
        return len(self.schema.names)

    @property
    def spacings(self) -> FloatArray:
        """[cases, 3] in mm."""
        return np.asarray(self.spacings_zyx_mm, dtype=np.float64)

    @property
    def shapes(self) -> FloatArray:
        """[cases, 3] in voxels."""
        return np.asarray(self.shapes_zyx, dtype=np.float64)

    @property
    def is_2d(self) -> bool:
        """True where no labeled case has more than one slice."""
        return bool(np.all(self.shapes[:, 0] == 1))


def dataset_facts(
    fingerprint: Fingerprint, description: DatasetDescription, dataset_name: str, n_labeled_patients: int | None = None
) -> DatasetFacts:
    """What planning needs of a fingerprint. Without a number of patients, each labeled case counts as one."""
    labeled = {name: case for name, case in fingerprint.cases.items() if case.pool == "labeled"}
    schema = description.label_schema()
    return DatasetFacts(
        dataset_name=dataset_name,
        channel_names=tuple(description.channel_names.values()),
        schema=schema,
        orientation=orientation_for(description.file_ending),
        file_ending=description.file_ending,
        spacings_zyx_mm=tuple(case.spacing_zyx_mm for case in labeled.values()),
        shapes_zyx=tuple(case.shape_after_crop_zyx for case in labeled.values()),
        n_unlabeled=sum(case.pool == "unlabeled" for case in fingerprint.cases.values()),
        n_labeled_patients=len(labeled) if n_labeled_patients is None else n_labeled_patients,
        median_relative_size_after_crop=fingerprint.median_relative_size_after_cropping,
        intensities={
            channel: IntensityProperties.model_validate(dict(properties))
            for channel, properties in fingerprint.foreground_intensity_properties_per_channel.items()
        },
        statistics=budget_statistics(fingerprint, list(labeled), schema),
    )


def numbers(values: Sequence[float] | FloatArray) -> str:
    """Sizes or spacings as text: 40 × 56 × 40."""
    return " × ".join(f"{float(value):.4g}" if float(value) % 1 else str(int(value)) for value in values)
