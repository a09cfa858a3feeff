"""The pseudo-label store: label maps and confidences of the unlabeled cases, whole rounds at a time, on disk."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from autossl.data.files import read_json, write_json
from autossl.data.store import write_array
from autossl.networks.prediction import Activation, probabilities_of


def label_and_confidence(
    logits: Tensor, activation: Activation, written_values: tuple[int, ...]
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]]:
    """Label map and confidence [z, y, x], both uint8, from logits [K, z, y, x].

    Softmax: argmax and the largest probability. Regions: written in their order; confidence is the smallest over
    regions of max(p, 1 - p). Confidence is probability × 255, rounded.
    """
    p = probabilities_of(logits, activation, dim=0)
    if activation == "sigmoid":
        label = torch.zeros(p.shape[1:], dtype=torch.uint8)
        for value, region in zip(written_values, p, strict=True):
            label[region > 0.5] = value
        confidence = torch.maximum(p, 1 - p).amin(0)
    else:
        confidence, winner = p.max(0)
        label = torch.tensor(written_values, dtype=torch.uint8)[winner]
    return label.numpy(), (confidence * 255).round().to(torch.uint8).numpy()


class PseudoLabelStore:
    """`<folder>/step_<n>/<case>_{label,confidence}.b2nd`; `step_<n>/complete.json` is written last and makes it valid.

    Args:
        folder: of this store, inside the fold's folder.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def paths(self, step: int, case: str) -> tuple[Path, Path]:
        """Label map and confidence of a case in the version that was made at `step`."""
        version = self.folder / f"step_{step}"
        return version / f"{case}_label.b2nd", version / f"{case}_confidence.b2nd"

    def begin(self, step: int) -> None:
        """Starts a version; what a killed run left of it is removed."""
        shutil.rmtree(self.folder / f"step_{step}", ignore_errors=True)
        (self.folder / f"step_{step}").mkdir(parents=True)

    def write(self, step: int, case: str, label: npt.NDArray[np.uint8], confidence: npt.NDArray[np.uint8]) -> None:
        """Writes one case of a version that was begun."""
        label_path, confidence_path = self.paths(step, case)
        write_array(label_path, label)
        write_array(confidence_path, confidence)

    def complete(self, step: int, cases: list[str]) -> None:
        """Declares the version whole and removes older ones."""
        write_json(self.folder / f"step_{step}" / "complete.json", {"step": step, "cases": cases})
        for other in self.folder.glob("step_*"):
            if int(other.name.removeprefix("step_")) < step:
                shutil.rmtree(other)

    def cases(self, step: int) -> list[str]:
        """Cases of a whole version; raises `InvalidInput` where it is missing or was not completed."""
        content = read_json(self.folder / f"step_{step}" / "complete.json")
        return list(content["cases"])
