"""The parts of the page that come from files of results: verdict, choice, rules, hidden test, what to label next."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from autossl.evaluation.report.model import (
    CandidateRow,
    Difference,
    FinalModel,
    HiddenModel,
    HiddenTest,
    LabelNextPart,
    NextRow,
    PostprocessingPart,
    SelectionPart,
    TrialRow,
    VerdictPart,
)
from autossl.evaluation.report.place import HIDDEN_TEST, LABEL_NEXT, PLAN, POSTPROCESSING, SELECTION, VERDICT, Place
from autossl.evaluation.report.scores import differences_per_case, folders_of
from autossl.evaluation.report.sources import COMPUTED, Form, Traced, pointer
from autossl.inference.postprocess import Rule

POSTPROCESSED = ", postprocessed"
"""In the name of a candidate of a verdict: with its rules."""
RANKED_SHOWN = 30
"""Lines of the list of cases to label; the file has all."""


class _File:
    """One file's values, traced."""

    def __init__(self, place: Place, name: str) -> None:
        self.files, self.source = place.files, place.result(name)

    def __call__(self, *parts: str | int, form: Form = "text") -> Traced:
        return self.files.traced(self.source, pointer(*parts), form)

    def get(self, *parts: str | int) -> Any:
        return self.files.get(self.source, *parts)

    def all(self, *parts: str | int, form: Form = "text") -> tuple[Traced, ...]:
        """Of a list."""
        return tuple(self(*parts, number, form=form) for number in range(len(self.get(*parts) or ())))

    @property
    def there(self) -> bool:
        return self.files.has(self.source)

    def difference(self, name: str, against: str, *parts: str | int, word: bool = True) -> Difference:
        def points(key: str) -> Traced:
            return self(*parts, key, form="points")

        def count(key: str) -> Traced:
            return self(*parts, key, form="count")

        has_p = self.get(*parts, "p_wilcoxon") is not None
        return Difference(
            name=name,
            against=against,
            word=self(*parts, "word") if word else None,
            estimate=points("estimate"),
            low=points("low"),
            high=points("high"),
            n_patients=count("n_patients"),
            wins=count("wins"),
            ties=count("ties"),
            losses=count("losses"),
            p=self(*parts, "p_wilcoxon", form="p") if has_p else None,
            p_holm=self(*parts, "p_holm", form="p") if has_p else None,
        )


def gather_verdict(place: Place) -> VerdictPart | None:
    """verdict.json, and the differences of its two sides per case."""
    file = _File(place, VERDICT)
    if not file.there:
        return None
    chosen, against = str(file.get("chosen")), str(file.get("against"))
    runs: Mapping[str, Any] = file.get("runs") or {}
    per_case, source = differences_per_case(place, runs, chosen, against)

    def named(name: str) -> str:
        folders = folders_of(runs, name)
        return place.named(folders[0]) if len(folders) == 1 and POSTPROCESSED not in name else name

    comparisons = [
        file.difference(named(entry["name"]), named(entry["against"]), "comparisons", number)
        for number, entry in enumerate(file.get("comparisons") or ())
    ]
    equal = file.get("equal_time")
    return VerdictPart(
        word=file("word"),
        sentence=file("sentence"),
        notes=file.all("notes"),
        level=file("level", form="percent"),
        overall=file.difference("all classes", named(against)),
        classes=tuple(file.difference(name, named(against), "per_class", name) for name in file.get("per_class") or ()),
        comparisons=tuple(comparisons),
        equal_time=file.difference(named(equal["name"]), named(equal["against"]), "equal_time") if equal else None,
        chosen=named(chosen),
        against=named(against),
        n_folds=file("n_folds", form="count"),
        n_seeds=file("n_seeds", form="count"),
        n_resamples=file("n_resamples", form="count"),
        left_out=file.all("left_out"),
        per_case=per_case,
        per_case_source=source,
    )


def gather_final(place: Place) -> FinalModel | None:
    """inference_plan.json."""
    file = _File(place, PLAN)
    if not file.there:
        return None
    rules = file.get("postprocessing") or ()
    return FinalModel(
        members=tuple(place.named(member["run"]) for member in file.get("members") or ()),
        combine=file("combine"),
        why=file("why"),
        dice=file("dice", form="dice"),
        n_cases=file("labels", "n_cases", form="count"),
        n_patients=file("labels", "n_patients", form="count"),
        rules=tuple(_rule(file, rule, f"postprocessing {number}") for number, rule in enumerate(rules)),
    )


def gather_hidden(place: Place) -> HiddenTest | None:
    """hidden_test.json."""
    file = _File(place, HIDDEN_TEST)
    if not file.there:
        return None
    models: Mapping[str, Any] = file.get("models") or {}
    classes = tuple(dict.fromkeys(name for model in models.values() for name in model["dice"]))
    return HiddenTest(
        what=file("what"),
        n_cases=file("n_cases", form="count"),
        n_patients=file("n_patients", form="count"),
        classes=classes,
        models=tuple(
            HiddenModel(
                name="final model" if name == "final" else place.named(name),
                is_final=name == "final",
                mean=file("models", name, "mean_dice", form="dice"),
                classes=tuple(file("models", name, "dice", of, form="dice") for of in classes),
            )
            for name in models
        ),
        to_twin=tuple(
            file.difference(
                "final model" if name == "final" else place.named(name),
                place.named(str(entry["twin"])),
                "to_twin",
                name,
                word=False,
            )
            for name, entry in (file.get("to_twin") or {}).items()
        ),
    )


def gather_selection(place: Place) -> SelectionPart | None:
    """selection.json."""
    file = _File(place, SELECTION)
    if not file.there:
        return None
    chosen, compared = file.get("chosen"), file.get("ensemble_minus_single")
    advantage = None
    if compared:
        names = place.named(compared["ensemble"]), place.named(compared["single"])
        advantage = file.difference(*names, "ensemble_minus_single", word=False)
    return SelectionPart(
        why=file("why"),
        candidates=tuple(
            CandidateRow(
                name=place.named(entry["name"]),
                chosen=entry["name"] == chosen,
                observed=file("candidates", number, "dice", "observed", form="dice"),
                low=file("candidates", number, "dice", "low", form="dice"),
                high=file("candidates", number, "dice", "high", form="dice"),
            )
            for number, entry in enumerate(file.get("candidates") or ())
        ),
        advantage=advantage,
        left_out={place.named(name): file("left_out", name) for name in file.get("left_out") or ()},
    )


def gather_postprocessing(place: Place) -> PostprocessingPart | None:
    """postprocessing.json."""
    file = _File(place, POSTPROCESSING)
    if not file.there:
        return None
    return PostprocessingPart(
        n_cases=file("found_on", "n_cases", form="count"),
        n_patients=file("found_on", "n_patients", form="count"),
        trials=tuple(
            TrialRow(
                rule=_rule(file, trial["rule"], f"why {number}"),
                kept=bool(trial["kept"]),
                gain=file("why", number, "gain", form="points"),
                low=file("why", number, "low", form="points"),
                high=file("why", number, "high", form="points"),
                n_changed=file("why", number, "n_cases_changed", form="count"),
                because=file("why", number, "because"),
            )
            for number, trial in enumerate(file.get("why") or ())
        ),
    )


def gather_label_next(place: Place) -> LabelNextPart | None:
    """label_next.json: the cases that were asked for."""
    file = _File(place, LABEL_NEXT)
    if not file.there:
        return None
    key = "next"
    ranked = file.get(key) or ()
    chosen = list(range(len(ranked)))[:RANKED_SHOWN]
    terms = tuple(ranked[chosen[0]]["terms"]) if chosen else ()
    return LabelNextPart(
        n_candidates=file("n_candidates", form="count"),
        rows=tuple(
            NextRow(
                case=str(ranked[number]["case"]),
                rank=file(key, number, "rank", form="count"),
                score=file(key, number, "score", form="figure"),
                terms={term: file(key, number, "terms", term, form="figure") for term in terms},
                reasons=file.all(key, number, "reasons"),
            )
            for number in chosen
        ),
        terms=terms,
        left_out={case: file("left_out", case) for case in file.get("left_out") or ()},
    )


def _rule(file: _File, content: Mapping[str, Any], where: str) -> Traced:
    """In words."""
    return Traced(str(Rule.model_validate(content)), file.source, f"{COMPUTED}rule {where}", "text")
