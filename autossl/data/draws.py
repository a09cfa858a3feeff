"""How cases are drawn: folds by patient, budgets in an order that a hash decides."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from fractions import Fraction
from hashlib import sha256

import numpy as np

from autossl.data.leaks import SplitCase
from autossl.data.problems import InvalidInput, Problem

FOLD_SEED = 12345
"""nnU-Net v2's seed of its five folds, so that both have the same folds where every patient has one case."""


def draw_folds(cases: Sequence[SplitCase], n_folds: int) -> dict[str, int]:
    """Case → validation fold. The patients, sorted, are cut as scikit-learn's shuffled k-fold cuts them.

    It is not called here because importing it takes a second, a seventh of planning and preprocessing 260 small cases.
    With fewer patients than folds there is one fold per patient; with a single patient there is none.
    """
    patients = sorted({case.patient for case in cases})
    n_folds = min(n_folds, len(patients))
    if n_folds < 2:
        return {}
    order = np.random.RandomState(FOLD_SEED).permutation(len(patients))
    fold_of = {patients[i]: fold for fold, chosen in enumerate(np.array_split(order, n_folds)) for i in chosen}
    return {case.id: fold_of[case.patient] for case in sorted(cases, key=lambda case: case.id)}


def place_new(
    new: Sequence[SplitCase], assigned: Mapping[str, int], patients: Mapping[str, str], n_folds: int
) -> dict[str, int]:
    """Folds of cases that came later: the fold of the patient's other cases, else the smallest fold.

    Args:
        new: the cases to place.
        assigned: case → fold of those placed before.
        patients: case → patient.
        n_folds: folds of the split.
    """
    placed = dict(assigned)
    result = {}
    for case in sorted(new, key=lambda case: (case.patient, case.id)):
        sizes = Counter(placed.values())
        own = Counter(fold for other, fold in placed.items() if patients.get(other) == case.patient)
        votes = own or {fold: -sizes[fold] for fold in range(n_folds)}
        placed[case.id] = result[case.id] = max(votes, key=lambda fold: (votes[fold], -fold))
    return result


def draw_order(generations: Iterable[Iterable[str]], patients: Mapping[str, str], draw: int) -> list[str]:
    """Cases in the order in which a draw takes them: by SHA-256 of draw and patient, later generations last."""

    def position(case: str) -> tuple[str, str]:
        return sha256(f"{draw}/{patients.get(case, case)}".encode()).hexdigest(), case

    return [case for generation in generations for case in sorted(generation, key=position)]


def normal_budget(budget: str | int) -> str:
    """A budget as it is written in names: "8", or "0.2" for a fraction.

    Raises:
        InvalidInput: where it is neither a positive integer nor a fraction above 0 and up to 1.
    """
    text = str(budget).strip()
    try:
        value = Fraction(text) if "/" not in text and "e" not in text.lower() else Fraction(0)
    except ValueError:
        value = Fraction(0)
    if "." in text and 0 < value <= 1:
        digits = text.rstrip("0").lstrip("0+")
        return "1.0" if value == 1 else f"0{digits}"
    if "." not in text and value >= 1:
        return str(int(value))
    raise InvalidInput(
        Problem(
            f"a label budget of '{budget}'",
            "a number of cases, such as 8, or with a point a fraction of them, such as 0.2",
            "correct --labeled",
        )
    )


def budget_size(budget: str, available: int, where: str) -> int:
    """How many cases a budget (`normal_budget`) means; fractions are rounded up.

    Raises:
        InvalidInput: where more are asked for than there are.
    """
    size = math.ceil(Fraction(budget) * available) if "." in budget else int(budget)
    if size > available or available == 0:
        raise InvalidInput(
            Problem(
                f"a budget of {budget} labeled cases, but {where} has {available}",
                f"at most {available}",
                "lower --labeled, or leave it out to train with all labels",
            )
        )
    return size
