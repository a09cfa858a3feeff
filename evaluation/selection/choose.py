"""The choice of the final model: pure functions of scores.

Candidates are ranked by pooled foreground Dice: the mean over the classes of the mean over all out-of-fold cases. Two
models cost twice the time of one, so an ensemble has to show that it gains: the interval of the difference between the
best ensemble and the best single model must lie above zero. Both are the best of several, and their figures owe part of
that to luck; so in each resample both are chosen again (`autossl.evaluation.resampling`).
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from autossl.evaluation.resampling import (
    Interval,
    Resamples,
    choose_again,
    draw_resamples,
    interval_of,
    interval_of_chosen,
    spread_of,
)
from autossl.evaluation.selection.candidates import Candidate, ScoredCandidates
from autossl.evaluation.verdict import FEWEST_PATIENTS

SUPERVISED = "supervised"
HELPED = "helped"
"""With any other verdict the final model is supervised: what the unlabeled cases add has to show."""


class Judgment(Protocol):
    """A verdict on the unlabeled cases, as far as the choice goes by it."""

    @property
    def word(self) -> str:
        """Helped, no evidence, hurt or too few to tell."""

    @property
    def sentence(self) -> str:
        """For the user."""


@dataclass(frozen=True)
class Ranked:
    """A candidate with its pooled foreground Dice."""

    candidate: Candidate
    interval: Interval
    """Over patients, and over trainings as far as they show; of this candidate alone."""


@dataclass(frozen=True)
class Choice:
    """What was chosen, and why."""

    chosen: Ranked
    ranked: tuple[Ranked, ...]
    """All candidates, the highest mean first."""
    up_for_choice: tuple[str, ...]
    """Names of those that the user's wish and the verdict leave."""
    advantage: Interval | None
    """Best ensemble minus best single model, of those that were up for choice; None where there was no ensemble."""
    compared: tuple[str, str] | None
    """Names of these two."""
    why: str


@dataclass(frozen=True)
class Wish:
    """What the user asks of the choice."""

    methods: tuple[str, ...] = ()
    """Of the final model; empty: the scores and the verdict decide."""
    ensemble: bool | None = None
    """True: the best ensemble, whatever its interval; False: no ensemble; None: the interval decides."""


def choose(scored: ScoredCandidates, wish: Wish | None = None, verdict: Judgment | None = None) -> Choice:
    """The final model.

    Args:
        scored: What there is to choose from.
        wish: Of the user; without methods, a verdict other than helped leaves supervised ones only.
        verdict: On the unlabeled cases; None: not judged.

    Raises:
        ValueError: No candidate is left.
    """
    wish, resamples = wish or Wish(), draw_resamples(scored.units)
    everyone = [*scored.singles, *scored.ensembles]
    ranked = [Ranked(one, interval_of(spread_of(one.dice[None], scored.units), resamples)) for one in everyone]
    ranked.sort(key=lambda one: -np.nan_to_num(one.interval.observed, nan=-1.0))  # of equals the single model first
    methods, reason = allowed_methods(wish, verdict)
    left = [one for one in ranked if methods is None or one.candidate.methods <= set(methods)]
    singles = [one for one in left if len(one.candidate.runs) == 1]
    ensembles = [one for one in left if len(one.candidate.runs) > 1 and wish.ensemble is not False]
    if not singles:
        raise ValueError(f"no candidate of {', '.join(methods or ())}")
    n_patients = len(set(scored.units))
    advantage = _advantage(ensembles, singles, scored, resamples) if ensembles else None
    taken, because = _taken(singles, ensembles, advantage, wish, n_patients)
    sentences = [reason, _place(taken, singles if len(taken.candidate.runs) == 1 else ensembles, n_patients), because]
    return Choice(
        chosen=taken,
        ranked=tuple(ranked),
        up_for_choice=tuple(one.candidate.name for one in (*singles, *ensembles)),
        advantage=advantage,
        compared=(ensembles[0].candidate.name, singles[0].candidate.name) if ensembles else None,
        why=" ".join(sentence for sentence in sentences if sentence),
    )


def allowed_methods(wish: Wish, verdict: Judgment | None) -> tuple[Collection[str] | None, str]:
    """Methods that the final model may be of (None: all), and the reason as a sentence."""
    if wish.methods:
        return wish.methods, f"The user asked for {' and '.join(wish.methods)}."
    if verdict is not None and verdict.word != HELPED:
        return (SUPERVISED,), (
            f"The verdict on the unlabeled cases is '{verdict.word}', so the final model is supervised; "
            f"naming a method overrules this. {verdict.sentence}"
        )
    return None, ""


def _advantage(
    ensembles: Sequence[Ranked], singles: Sequence[Ranked], scored: ScoredCandidates, resamples: Resamples
) -> Interval:
    """Of the first ensemble over the first single model; both lists are ranked."""
    units = scored.units
    sides = [[one.candidate.dice[None] for one in side] for side in (ensembles, singles)]
    picks = [choose_again(side, units, resamples)[1] for side in sides]
    pairs = [[spread_of(one - other, units) for other in sides[1]] for one in sides[0]]
    return interval_of_chosen((0, 0), (picks[0], picks[1]), pairs, resamples)


def _taken(
    singles: Sequence[Ranked], ensembles: Sequence[Ranked], advantage: Interval | None, wish: Wish, n_patients: int
) -> tuple[Ranked, str]:
    """The candidate, and why it is no or an ensemble."""
    if advantage is None:
        return singles[0], ""
    difference = (
        f"the ensemble with the highest Dice, {ensembles[0].candidate.name}, differs from the single model with the "
        f"highest Dice by {points(advantage.estimate)} points ({points(advantage.low)} to {points(advantage.high)}, "
        "95 % interval, the choosing included)"
    )
    if wish.ensemble:
        return ensembles[0], f"The user asked for an ensemble; {difference}."
    if n_patients < FEWEST_PATIENTS:
        return singles[0], f"With {n_patients} patients no ensemble is preferred to a single model."
    if advantage.low > 0:
        return ensembles[0], f"An ensemble is worth its time here: {difference}."
    return singles[0], f"No ensemble was taken: {difference}, which does not lie above zero."


def _place(taken: Ranked, among: Sequence[Ranked], n_patients: int) -> str:
    interval, kind = taken.interval, "single models" if len(taken.candidate.runs) == 1 else "ensembles"
    of = f"the highest of {len(among)} {kind}" if len(among) > 1 else "the only candidate of its kind"
    return (
        f"{taken.candidate.name}: pooled out-of-fold Dice {100 * interval.observed:.2f} "
        f"({100 * interval.low:.2f} to {100 * interval.high:.2f}, {n_patients} patients), {of}."
    )


def points(value: float) -> str:
    """A difference of Dice in points, with its sign."""
    return f"{100 * value:+.2f}"
