"""What the methods are, in words and values, for people who choose one."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, fields
from typing import Any

from autossl.trainers.base import Needs, SemiSupervisedTrainer
from autossl.trainers.registry import all_methods, method_class

NEEDS_IN_WORDS = {
    "networks": "networks trained",
    "teacher": "a teacher (moving average of the weights)",
    "views": "augmented views of each unlabeled patch",
    "strong_view": "a strongly augmented view",
    "modalities": "image channels as separate modalities",
    "meta_labels": "meta-labels: place in the scan, patient, and attributes of cases.csv where there are any",
    "signed_distance": "signed distance maps of the labels",
    "levels": "or more levels of deep supervision",
    "softmax_only": "exclusive labels (no regions)",
}


@dataclass(frozen=True)
class SettingDescription:
    """One setting of a method."""

    name: str
    default: str
    meaning: str
    source: str
    """Where the default comes from."""


@dataclass(frozen=True)
class MethodDescription:
    """One method."""

    name: str
    title: str
    idea: str
    citation: str
    needs: tuple[str, ...]
    """Beyond one network and its labeled patches; empty where there is nothing."""
    settings: tuple[SettingDescription, ...]
    reduces_to_supervised: bool
    """True: without unlabeled cases it is `supervised`, bit for bit."""
    ablation: dict[str, str]
    """Settings that switch off what makes the method itself; empty where none are named."""


def describe_methods() -> list[MethodDescription]:
    """All methods, in the order of the registry."""
    return [_describe(name, method) for name, method in all_methods().items()]


def describe_method(name: str) -> MethodDescription:
    """The named method.

    Raises:
        InvalidInput: unknown; with the nearest names.
    """
    return _describe(name, method_class(name))


def _describe(name: str, method: type[SemiSupervisedTrainer]) -> MethodDescription:
    settings = [
        SettingDescription(
            name=key,
            default=_shown(field.default),
            meaning=field.description or "",
            source=str(extra.get("source", "")) if isinstance(extra := field.json_schema_extra, dict) else "",
        )
        for key, field in method.Settings.model_fields.items()
    ]
    return MethodDescription(
        name=name,
        title=method.title,
        idea=" ".join((inspect.getdoc(method) or "").split()),
        citation=method.citation,
        needs=tuple(_needs_in_words(method.needs)),
        settings=tuple(settings),
        reduces_to_supervised=method.reduces_to_supervised,
        ablation=dict(method.ablation),
    )


def _shown(default: Any) -> str:
    """A default in a few characters: 2 / 3 is 0.6667."""
    if isinstance(default, float):
        return str(float(f"{default:.4g}"))
    return "none" if default is None else str(default)


def _needs_in_words(needs: Needs) -> list[str]:
    """Every need that goes beyond a plain network, with its number where it is one."""
    words = []
    for field in fields(Needs):
        value = getattr(needs, field.name)
        if value == field.default:
            continue
        if field.name == "dims":
            words.append(f"{' or '.join(str(dims) for dims in value)}D data")
            continue
        text = NEEDS_IN_WORDS.get(field.name, field.name)
        words.append(text if value is True else f"{value} {text}")
    return words
