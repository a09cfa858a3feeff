"""`autossl`: prints the list of commands."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from autossl.version import __version__

COMMANDS = {
    "autossl_run": "Everything from the raw folder to the final model and its report, resumable.",
    "autossl_convert": "Turn a dataset of another layout (Decathlon, BIDS, h5) into a raw dataset.",
    "autossl_plan_and_preprocess": "Measure a dataset, plan its configurations, and preprocess its cases.",
    "autossl_train": "Train a method on folds of a planned dataset.",
    "autossl_find_best_configuration": "Choose the final model among trained runs and their ensembles.",
    "autossl_find_postprocessing": "Find the postprocessing rules that the pooled folds speak for.",
    "autossl_predict": "Segment a folder of images with a trained run, or with the ensemble that was chosen.",
    "autossl_ensemble": "Average the probabilities of several folders of segmentations.",
    "autossl_apply_postprocessing": "Tidy a folder of segmentations by postprocessing rules.",
    "autossl_evaluate": "Score a folder of segmentations against references.",
    "autossl_verdict": "Judge from finished runs whether the unlabeled cases helped.",
    "autossl_label_next": "Rank the unlabeled cases that are worth labeling next, with the reasons.",
    "autossl_report": "Write everything about a split into one page, or check the page against the files.",
    "autossl_export_model": "Put a final model into one file, to share it.",
    "autossl_install_model": "Put a shared model into the workspace, to predict with it.",
    "autossl_export_nnunet": "Write a trained run as a model of nnU-Net v2.",
    "autossl_import_nnunet": "Make a run of a trained nnU-Net v2 model.",
    "autossl_methods": "List the training methods, or show one with its settings.",
    "autossl_benchmark": "Compare methods with their supervised twin, and train what is missing for that.",
    "autossl_demo": "Run everything on a small made-up dataset, in a few minutes.",
}
"""Command → what it does, in the order in which they are used; also the description of each command's --help."""


def main(argv: Sequence[str] | None = None) -> int:
    """Prints one line per command."""
    parser = argparse.ArgumentParser(prog="autossl", description="Print the commands of autossl, one line each.")
    parser.add_argument("--version", action="version", version=f"autossl {__version__}")
    parser.parse_args(argv)
    width = max(len(name) for name in COMMANDS)
    for name, meaning in COMMANDS.items():
        print(f"{name:<{width}}  {meaning}")
    print("Each explains itself with --help.")
    return 0
