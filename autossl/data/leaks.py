"""Which cases may not be trained on, because a validation or test case shows the same image or the same patient."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from autossl.data.hashes import DuplicatePair


@dataclass(frozen=True)
class SplitCase:
    """What a split has to know of a case."""

    id: str
    patient: str
    pool: Literal["labeled", "unlabeled", "test"]


def leaks(
    cases: Sequence[SplitCase], held_out: Mapping[str, str], duplicates: Iterable[DuplicatePair] = ()
) -> dict[str, str]:
    """Cases that would carry held-out cases into training, with the reason.

    Such are: a case with the same voxels as a held-out one; another scan of its patient; a similar image; and a scan
    of a patient whom identical scans link to the patient of a held-out one.

    Args:
        cases: all cases of the dataset.
        held_out: case id → what it is held out for ("validation", "test", "hidden test").
        duplicates: pairs of the fingerprint; those that name an unknown case are passed over.
    """
    by_id = {case.id: case for case in cases}
    pairs = [pair for pair in duplicates if pair.first in by_id and pair.second in by_id]
    persons = _Groups()
    for pair in pairs:
        if pair.kind == "identical":
            persons.join(by_id[pair.first].patient, by_id[pair.second].patient)
    held_of_patient: dict[str, str] = {}
    held_of_person: dict[str, str] = {}
    for held in sorted(set(held_out) & set(by_id)):
        held_of_patient.setdefault(by_id[held].patient, held)
        held_of_person.setdefault(persons.find(by_id[held].patient), held)
    looks_like = _held_twins(pairs, held_out)
    reasons: dict[str, str] = {}
    for case_id, case in by_id.items():
        if case_id in held_out:
            continue
        kind, twin, similarity = looks_like.get(case_id, ("", "", 0.0))
        patient_mate = held_of_patient.get(case.patient)
        person_mate = held_of_person.get(persons.find(case.patient))
        if kind == "identical":
            reasons[case_id] = f"the same image as {held_out[twin]} case {twin}"
        elif patient_mate:
            reasons[case_id] = f"another scan of the patient of {held_out[patient_mate]} case {patient_mate}"
        elif kind:
            reasons[case_id] = f"looks like {held_out[twin]} case {twin} (correlation {similarity:.3f})"
        elif person_mate:
            reasons[case_id] = f"identical scans link its patient to that of {held_out[person_mate]} case {person_mate}"
    return reasons


def _held_twins(pairs: Iterable[DuplicatePair], held_out: Mapping[str, str]) -> dict[str, tuple[str, str, float]]:
    """Case → kind, held-out case and similarity of its closest pair with a held-out case."""
    closest: dict[str, tuple[str, str, float]] = {}
    for pair in sorted(pairs, key=lambda pair: (pair.kind != "identical", -pair.similarity, pair.first, pair.second)):
        for case, twin in ((pair.first, pair.second), (pair.second, pair.first)):
            if twin in held_out:
                closest.setdefault(case, (pair.kind, twin, pair.similarity))
    return closest


class _Groups:
    """Names that belong together (union-find)."""

    def __init__(self) -> None:
        self._parent: dict[str, str] = {}

    def find(self, name: str) -> str:
        """The representative of a name's group."""
        while (parent := self._parent.get(name, name)) != name:
            name = parent
        return name

    def join(self, first: str, second: str) -> None:
        """Puts two names into one group."""
        self._parent[self.find(first)] = self.find(second)
