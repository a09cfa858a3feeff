"""Options that several commands have, and how their texts become values."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from pathlib import Path


def add_workspace(parser: argparse.ArgumentParser) -> None:
    """--workspace."""
    parser.add_argument(
        "--workspace",
        type=Path,
        metavar="FOLDER",
        help="folder with raw/, preprocessed/ and results/ (default: $AUTOSSL_WORKSPACE, else ./autossl_workspace)",
    )


def add_workers(parser: argparse.ArgumentParser, work: str, beside_loaders: bool = False) -> None:
    """-np, also as --num_workers where that does not name the loader processes of trainings."""
    parser.add_argument(
        "-np",
        "--num_processes",
        *([] if beside_loaders else ["--num_workers"]),
        type=non_negative,
        metavar="N",
        help=f"processes that {work}; 0: none (default: one per CPU, fewer where memory is short)",
    )


def add_device(parser: argparse._ActionsContainer) -> None:
    """--device."""
    parser.add_argument(
        "--device", default="auto", metavar="D", help="auto, cpu, cuda, cuda:1 or mps (default: auto, the fastest)"
    )


def add_run_filter(parser: argparse.ArgumentParser, title: str) -> None:
    """-c, -m, --preset, --labeled, --draw, --seed and --tag: which of a dataset's runs."""
    run = parser.add_argument_group(title)
    run.add_argument("-c", "--configuration", metavar="C", help="2d, 3d_fullres or 3d_lowres")
    run.add_argument("-m", "--method", metavar="METHOD", help="see autossl_methods")
    run.add_argument("--preset", metavar="P", help="of its plans")
    run.add_argument("--labeled", metavar="N", type=budget_or_all, help="its label budget; 'all' for runs without one")
    run.add_argument("--draw", type=non_negative, metavar="D", help="its draw of labels")
    run.add_argument("--seed", type=non_negative, metavar="S", help="its seed")
    run.add_argument("--tag", metavar="T", help="its tag; '' for runs without one")


def setting_pair(text: str) -> tuple[str, str]:
    """'key=value' as a pair."""
    key, sign, value = text.partition("=")
    if not key or not sign:
        raise argparse.ArgumentTypeError(f"'{text}' is no key=value pair")
    return key, value


def method_setting(text: str) -> tuple[str, str, str]:
    """'method.key=value' as its three parts."""
    name, value = setting_pair(text)
    method, point, key = name.partition(".")
    if not method or not point or not key:
        raise argparse.ArgumentTypeError(f"'{text}': expected METHOD.KEY=VALUE, as in mean_teacher.noise=0.2")
    return method, key, value


def settings_by_method(settings: Iterable[tuple[str, str, str]]) -> dict[str, dict[str, str]]:
    """Method → key → value, of what `method_setting` gives; the last one of a key counts."""
    grouped: dict[str, dict[str, str]] = {}
    for method, key, value in settings:
        grouped.setdefault(method, {})[key] = value
    return grouped


def tolerance(text: str) -> tuple[str, float]:
    """'name=1.5' as class and millimeters."""
    name, value = setting_pair(text)
    try:
        return name, float(value)
    except ValueError:
        raise argparse.ArgumentTypeError(f"'{text}': expected a number of millimeters, as in organ=1.5") from None


def label_pair(text: str) -> tuple[str, tuple[int, ...]]:
    """'name=1' or 'name=1,2' (a region) as name and label values."""
    name, value = setting_pair(text)
    try:
        values = tuple(int(part) for part in value.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"'{text}': expected whole numbers, as in organ=1 or whole=1,2") from None
    if min(values) < 0:
        raise argparse.ArgumentTypeError(f"'{text}': label values are 0 or higher")
    return name, values


def fold_name(text: str) -> str:
    """A fold number, 'all' or 'all_folds'."""
    if text in ("all", "all_folds"):
        return text
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"'{text}' is no fold: expected 0, 1, …, all or all_folds")
    return str(int(text))


def label_budget(text: str) -> str:
    """'8' (cases) or '0.2' (a fraction), as text: 1 case and the fraction 1.0 are not the same."""
    if text.isdecimal() and int(text) > 0:
        return str(int(text))
    if "." in text:
        return str(share(text))
    raise argparse.ArgumentTypeError(f"'{text}' is no budget: expected a number of cases (8) or a fraction (0.2)")


def budget_or_all(text: str) -> str:
    """'all' (no label is hidden), or what `label_budget` takes."""
    return text if text == "all" else label_budget(text)


def positive(text: str) -> int:
    """A whole number above 0."""
    number = non_negative(text)
    if number == 0:
        raise argparse.ArgumentTypeError("0 is too small, expected 1 or more")
    return number


def non_negative(text: str) -> int:
    """A whole number, 0 or above."""
    if not text.isdigit():
        raise argparse.ArgumentTypeError(f"'{text}' is no whole number of 0 or more")
    return int(text)


def positive_real(text: str) -> float:
    """A number above 0."""
    try:
        number = float(text)
    except ValueError:
        number = float("nan")
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"'{text}' is no number above 0")
    return number


def share(text: str) -> float:
    """A number above 0 and at most 1."""
    number = positive_real(text)
    if number > 1:
        raise argparse.ArgumentTypeError(f"{text} is too large, expected at most 1")
    return number
