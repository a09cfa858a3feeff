"""The pseudo-label store: label maps and confidences of the unlabeled cases, whole versions at a time, on disk."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from autossl.data.files import read_json, remove_folder, write_json
from autossl.data.labels import LabelSchema
from autossl.data.problems import InvalidInput
from autossl.data.store import open_array, write_array
from autossl.networks.prediction import Activation, probabilities_of


def label_and_confidences(
    logits: Tensor, activation: Activation, schema: LabelSchema
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]]:
    """Label map [z, y, x] and confidences [K, z, y, x], both uint8, from logits [C, z, y, x].

    Softmax: argmax and the largest probability (K = 1). Regions: written in their order; per region (K = C) the
    probability of what the label map says of it. Confidence is probability × 255, rounded.
    """
    p = probabilities_of(logits, activation, dim=0)
    values = torch.tensor(schema.written_values, dtype=torch.uint8, device=p.device)
    if activation == "sigmoid":
        label = torch.zeros(p.shape[1:], dtype=torch.uint8, device=p.device)
        for value, region in zip(values, p, strict=True):
            label[region > 0.5] = value
        confidences = 1 - p
        for index, members in enumerate(schema.foreground.values()):
            inside = torch.isin(label, torch.tensor(members, dtype=torch.uint8, device=p.device))
            confidences[index] = torch.where(inside, p[index], confidences[index])
    else:
        highest, winner = p.max(0)
        label, confidences = values[winner], highest[None]
    return label.cpu().numpy(), (confidences * 255).round().to(torch.uint8).cpu().numpy()


class PseudoLabelStore:
    """Versions of the pseudo-labels of a fold, `<folder>/step_<n>/`, one for each refresh.

    `origin.json`                              what the version was made from; written first
    `<case>_{label,confidence}.b2nd`           uint8 [z, y, x]; confidence × 255, 0: not to be used
    `<case>_all_confidences.b2nd`              uint8 [K, z, y, x], until the version is complete
    `cases/<case>.json`                        what is known of a case; written last of its files
    `report.json`                              what was decided, for people
    `complete.json`                            which cases may be used; written last and makes the version valid

    Args:
        folder: of this store, inside the fold's folder.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def version(self, step: int) -> Path:
        """Folder of the version that was made at `step`."""
        return self.folder / f"step_{step}"

    def paths(self, step: int, case: str) -> tuple[Path, Path]:
        """Label map and confidence of a case in the version that was made at `step`."""
        return self.version(step) / f"{case}_label.b2nd", self.version(step) / f"{case}_confidence.b2nd"

    # -------------------------------------------------------------------------------------------------------- writing

    def begin(self, step: int, origin: Mapping[str, Any] | None = None) -> None:
        """Starts a version, or goes on with one that was begun from the same origin; any other is removed.

        Args:
            step: of the refresh.
            origin: plain values that decide what is written.
        """
        path = self.version(step) / "origin.json"
        wanted = json.loads(json.dumps(origin or {}))
        if path.is_file() and _same(path, wanted):
            return
        remove_folder(self.version(step))
        write_json(path, wanted)

    def write_case(
        self, step: int, case: str, label: npt.NDArray[np.uint8], confidences: npt.NDArray[np.uint8] | None, facts: Any
    ) -> None:
        """Writes what was predicted of one case of a version that was begun: confidences [K, z, y, x] to decide on."""
        write_array(self.paths(step, case)[0], label)
        if confidences is not None:
            write_array(self._all_confidences(step, case), confidences)
        write_json(self._facts(step, case), facts)

    def write_confidence(self, step: int, case: str, confidence: npt.NDArray[np.uint8]) -> None:
        """Writes the confidence [z, y, x] that batches come with."""
        write_array(self.paths(step, case)[1], confidence)

    def complete(self, step: int, used: Mapping[str, float], ends_run: bool = False) -> None:
        """Declares the version whole.

        Args:
            step: of the refresh.
            used: case → what a patch of it counts; cases that are not in it are not used.
            ends_run: what the refresh decided.
        """
        content = {"step": step, "cases": list(used), "weights": dict(used), "ends_run": ends_run}
        write_json(self.version(step) / "complete.json", content)

    def tidy(self, step: int, keep_older: bool = False) -> None:
        """Removes what is not needed any more once the version of this step is whole; may be called again.

        Args:
            step: of the refresh.
            keep_older: False: older versions go, but for the last of them: a run that goes on from its checkpoint of
                before needs it.
        """
        for path in self.version(step).glob("*_all_confidences.b2nd"):
            path.unlink()
        older = sorted(other for other in self._steps() if other < step)
        for other in older[:-1] if not keep_older else ():
            remove_folder(self.version(other))

    # -------------------------------------------------------------------------------------------------------- reading

    def is_complete(self, step: int) -> bool:
        """Whether the version is whole."""
        return (self.version(step) / "complete.json").is_file()

    def has(self, step: int, case: str) -> bool:
        """Whether `write_case` has finished the case."""
        return self._facts(step, case).is_file()

    def facts(self, step: int, case: str) -> Any:
        """What `write_case` was given."""
        return read_json(self._facts(step, case))

    def predicted(self, step: int, case: str) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]]:
        """Label map and all confidences, as `write_case` got them, while the version is not complete."""
        label, confidences = self.paths(step, case)[0], self._all_confidences(step, case)
        return open_array(label)[:], open_array(confidences)[:]

    def label(self, step: int, case: str) -> npt.NDArray[np.uint8]:
        """Label map of a case, used or not."""
        found: npt.NDArray[np.uint8] = open_array(self.paths(step, case)[0])[:]
        return found

    def cases(self, step: int) -> list[str]:
        """Cases of a whole version that are used; raises `InvalidInput` where it is missing or was not completed."""
        return list(self.weights(step))

    def weights(self, step: int) -> dict[str, float]:
        """The same cases, with what a patch of each counts."""
        return dict(read_json(self.version(step) / "complete.json")["weights"])

    def ends_run(self, step: int) -> bool:
        """Whether the run ends with this version."""
        return bool(read_json(self.version(step) / "complete.json")["ends_run"])

    def previous(self, step: int) -> int | None:
        """Step of the last whole version before this one."""
        return max((other for other in self._steps() if other < step and self.is_complete(other)), default=None)

    def _steps(self) -> Sequence[int]:
        return [int(path.name.removeprefix("step_")) for path in self.folder.glob("step_*")]

    def _facts(self, step: int, case: str) -> Path:
        return self.version(step) / "cases" / f"{case}.json"

    def _all_confidences(self, step: int, case: str) -> Path:
        return self.version(step) / f"{case}_all_confidences.b2nd"


def _same(path: Path, wanted: Any) -> bool:
    """Whether a JSON file says what is wanted; a damaged one does not."""
    try:
        return bool(read_json(path) == wanted)
    except InvalidInput:
        return False
