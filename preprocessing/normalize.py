"""Intensity normalization by the schemes of nnU-Net v2, one channel at a time."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from autossl.data.problems import InvalidInput, Problem, nearest
from autossl.planners.plans import NORMALIZATION_SCHEMES, IntensityProperties

SMALLEST_DIVISOR = 1e-8  # nnU-Net v2


def normalize_channel(
    channel: npt.NDArray[np.float32],
    scheme: str,
    properties: IntensityProperties | None = None,
    mask: npt.NDArray[np.bool_] | None = None,
) -> npt.NDArray[np.float32]:
    """The normalized channel as a new array.

    Args:
        channel: [z,y,x].
        scheme: a name from `NORMALIZATION_SCHEMES`.
        properties: of the dataset's labeled foreground; CTNormalization needs them.
        mask: only used by ZScoreNormalization: statistics are taken inside, and the outside stays as it is.

    Raises:
        InvalidInput: an unknown scheme, missing properties, or values outside 0..255 for RGBTo01Normalization.
    """
    result = channel.astype(np.float32, order="C", copy=True)
    if scheme == "ZScoreNormalization":
        return _z_score(result, mask)
    if scheme == "CTNormalization":
        return _clipped_z_score(result, properties)
    if scheme == "RescaleTo01Normalization":
        result -= result.min()
        result /= max(float(result.max()), SMALLEST_DIVISOR)
        return result
    if scheme == "RGBTo01Normalization":
        return _byte_to_unit(result)
    if scheme != "NoNormalization":
        raise InvalidInput(
            Problem(
                f"normalization scheme '{scheme}'",
                f"one of {nearest(scheme, NORMALIZATION_SCHEMES)}",
                "correct normalization_schemes in the plans or plan again",
            )
        )
    return result


def _z_score(volume: npt.NDArray[np.float32], mask: npt.NDArray[np.bool_] | None) -> npt.NDArray[np.float32]:
    if mask is None or mask.all():
        mean, std = _mean_and_std(volume)
        volume -= mean
        volume /= max(std, SMALLEST_DIVISOR)
    elif mask.any():
        inside = volume[mask]
        mean, std = _mean_and_std(inside)
        volume[mask] = (inside - np.float32(mean)) / np.float32(max(std, SMALLEST_DIVISOR))
    return volume


def _mean_and_std(values: npt.NDArray[np.float32]) -> tuple[float, float]:
    """In double precision, block by block: single precision loses digits on large volumes with a large mean."""
    mean = float(values.mean(dtype=np.float64))
    flat = values.reshape(-1)
    squares = 0.0
    for start in range(0, flat.size, 1 << 16):
        deviations = flat[start : start + (1 << 16)].astype(np.float64) - mean
        squares += float(deviations @ deviations)
    return mean, (squares / flat.size) ** 0.5


def _clipped_z_score(
    volume: npt.NDArray[np.float32], properties: IntensityProperties | None
) -> npt.NDArray[np.float32]:
    if properties is None:
        raise InvalidInput(
            Problem(
                "CTNormalization without intensity properties of the channel",
                "foreground_intensity_properties_per_channel with an entry for each channel",
                "plan again with autossl_plan_and_preprocess",
            )
        )
    np.clip(volume, properties.percentile_00_5, properties.percentile_99_5, out=volume)
    volume -= properties.mean
    volume /= max(properties.std, SMALLEST_DIVISOR)
    return volume


def _byte_to_unit(volume: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
    lowest, highest = float(volume.min()), float(volume.max())
    if lowest < 0 or highest > 255:
        raise InvalidInput(
            Problem(
                f"values from {lowest:g} to {highest:g} in a channel that is normalized as RGB",
                "values from 0 to 255",
                "name the channel by its modality in dataset.json (channel_names) and plan again",
            )
        )
    volume /= 255.0
    return volume
