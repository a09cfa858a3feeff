"""`autossl_methods`: lists the training methods, or shows one."""

from __future__ import annotations

import argparse
import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING

from autossl.cli.run_command import new_parser, run_command

if TYPE_CHECKING:
    from autossl.trainers.describe import MethodDescription

WIDTH = 100


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    return run_command(_parser(), _show, argv)


def _parser() -> argparse.ArgumentParser:
    parser = new_parser("autossl_methods", "example: autossl_methods mean_teacher")
    parser.add_argument("method", nargs="?", metavar="METHOD", help="show this one whole; default: list all")
    return parser


def _show(arguments: argparse.Namespace) -> None:
    from autossl.trainers.describe import describe_method, describe_methods

    if arguments.method:
        _print_method(describe_method(arguments.method))
        return
    methods = describe_methods()
    width = max(len(method.name) for method in methods)
    for method in methods:
        print(f"{method.name:<{width}}  {method.title}")


def _print_method(method: MethodDescription) -> None:
    print(f"{method.name}: {method.title}\n")
    _print_paragraph("idea", method.idea)
    _print_paragraph("citation", method.citation)
    _print_paragraph("needs", "; ".join(method.needs) or "nothing beyond labeled cases")
    without = (
        "the same run as supervised, bit for bit" if method.reduces_to_supervised else "its labeled-only objective"
    )
    _print_paragraph("without unlabeled cases", without)
    if method.ablation:
        settings = " ".join(f"{name}={value}" for name, value in method.ablation.items())
        _print_paragraph("without what makes it itself", f"--set {settings}")
    print("settings (--set NAME=VALUE)" if method.settings else "settings: none")
    for setting in method.settings:
        print(f"  {setting.name} = {setting.default}")
        _print_indented(f"{setting.meaning}; default from: {setting.source}", 6)


def _print_paragraph(heading: str, text: str) -> None:
    print(heading)
    _print_indented(text, 2)
    print()


def _print_indented(text: str, indent: int) -> None:
    print(textwrap.fill(text, WIDTH, initial_indent=" " * indent, subsequent_indent=" " * indent))
