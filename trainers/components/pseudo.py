"""Pseudo-labels from probabilities, and how they are cleaned and sharpened."""

from __future__ import annotations

from collections.abc import Sequence

import cc3d
import numpy as np
import numpy.typing as npt
import torch
from scipy import ndimage
from torch import Tensor


@torch.no_grad()
def pseudo_label(q: Tensor, regions: bool = False) -> tuple[Tensor, Tensor]:
    """Hard labels and their confidence from probabilities [N, C, *S]; no gradient.

    Returns:
        Softmax: the most probable class, int64 [N, 1, *S], and its probability, float32 [N, 1, *S].
        Regions: q > 0.5 as 0/1, float32 [N, C, *S], and max(q, 1 - q), float32 [N, C, *S].
    """
    q = q.float()
    if regions:
        return (q > 0.5).float(), torch.maximum(q, 1 - q)
    confidence, labels = q.max(1, keepdim=True)
    return labels, confidence


def sharpen(log_p: Tensor, temperature: float = 0.1) -> Tensor:
    """softmax(log_p / temperature) over axis 1: p_c^(1/temperature), normalized. From logs, since p^10 underflows."""
    return torch.softmax(log_p.float() / temperature, 1)


@torch.no_grad()
def keep_largest(labels: Tensor, classes: Sequence[int], spare_border: bool = True) -> Tensor:
    """Removes all but the largest component of the given classes; removed voxels become background.

    Voxels that share a corner are connected. The components of each sample and class are found on the CPU, inside
    the class's bounding box.

    Args:
        labels: integers [N, 1, *S]; or regions, floating 0/1 [N, C, *S]. Not changed.
        classes: output channels (softmax: from 1; regions: from 0) whose components are judged.
        spare_border: keep every component that touches the border of S, since the object may go on outside a patch.

    Raises:
        ValueError: the background is among the classes.
    """
    regions = labels.is_floating_point()
    if not regions and 0 in classes:
        raise ValueError("keep_largest got class 0: the background may have any number of components")
    if not classes:
        return labels
    chosen = labels[:, list(classes)] > 0.5 if regions else labels
    array = chosen.to(torch.int16).cpu().numpy()
    numbers = [1] if regions else list(classes)
    removed = np.zeros(array.shape, dtype=bool)
    for index in np.ndindex(array.shape[:2]):
        _mark_islands(array[index], numbers, spare_border, removed[index])
    if not removed.any():
        return labels
    islands = torch.from_numpy(removed).to(labels.device)
    if not regions:
        return labels.masked_fill(islands, 0)
    cleaned = labels.clone()
    cleaned[:, list(classes)] = labels[:, list(classes)].masked_fill(islands, 0)
    return cleaned


def _mark_islands(
    label_map: npt.NDArray[np.integer], classes: Sequence[int], spare_border: bool, removed: npt.NDArray[np.bool_]
) -> None:
    """Sets `removed` [*S] where a voxel of a class lies outside the class's largest component."""
    boxes = ndimage.find_objects(label_map, max_label=max(classes))
    for number in classes:
        box = boxes[number - 1]
        if box is None:
            continue
        # numbers, not booleans: cc3d 4.1.1 connects boolean images over corners wrongly where a side is odd
        mask = (label_map[box] == number).view(np.uint8)
        components, n_components = cc3d.connected_components(
            mask, connectivity=8 if mask.ndim == 2 else 26, return_N=True
        )
        if n_components < 2:
            continue
        sizes = np.bincount(components.ravel(), minlength=n_components + 1)
        kept = np.zeros(n_components + 1, dtype=bool)
        kept[0] = True  # what is no voxel of the class
        kept[1 + int(sizes[1:].argmax())] = True
        if spare_border:
            for axis, (cut, size) in enumerate(zip(box, label_map.shape, strict=True)):
                faces = [face for face, touches in ((0, cut.start == 0), (-1, cut.stop == size)) if touches]
                kept[np.take(components, faces, axis=axis)] = True
        removed[box] |= ~kept[components]
