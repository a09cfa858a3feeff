"""A trained nnU-Net v2 model where it lies: a folder, or the zip file that nnUNetv2_export_model_to_zip writes.

Of a zip only plans.json, dataset.json and the checkpoints that were asked for are unpacked, below a folder of ours; a
zip in which any name would leave its folder, or that holds links, is refused as a whole, whatever else is in it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

from autossl.data.archive_files import ArchiveFile, Limits, open_archive, unpack
from autossl.data.problems import InvalidInput, Problem

PLANS, DESCRIPTION = "plans.json", "dataset.json"
CHECKPOINT = "checkpoint_final.pth"
FOLD = re.compile(r"^fold_(0|[1-9]\d{0,3}|all)$")
LIMITS = Limits(entries=100_000, directory_bytes=32 << 20, unpacked_bytes=1 << 42)
"""Such a zip may hold the predictions of a whole cross-validation, which stay in it."""
MAX_INFLATION = 20
"""What is unpacked, in sizes of its packed bytes; weights hardly shrink."""
ALWAYS_ALLOWED_BYTES = 64 << 20
LISTED_DEPTH = 2
"""Folders below the given one in which models are looked for."""
EXPECTED = "a folder with plans.json, dataset.json and fold_k/checkpoint_final.pth, or a zip file with one"
FIX = "name the folder TRAINER__PLANS__CONFIGURATION of a model that nnUNetv2_train trained, or its exported zip"
ZIP_FIX = "do not use it; ask its author for a zip that nnUNetv2_export_model_to_zip wrote, or copy it again"


@dataclass(frozen=True)
class SourceModel:
    """One trained model: names below the folder or in the zip."""

    root: str
    """Of its folder; "" where it is the given folder itself."""
    folds: Mapping[str, str]
    """Fold ("0", …, "all") → its checkpoint."""

    def name(self, file: str) -> str:
        """Of a file beside the folds."""
        return f"{self.root}/{file}" if self.root else file

    def files(self) -> list[str]:
        """All that is needed of it."""
        return [self.name(PLANS), self.name(DESCRIPTION), *self.folds.values()]


@dataclass(frozen=True)
class LocalModel:
    """The chosen model as files that can be read."""

    plans: Path
    description: Path
    checkpoints: Mapping[str, Path]
    """Fold → file."""
    folder_name: str
    """TRAINER__PLANS__CONFIGURATION, as a rule."""


@contextmanager
def open_model(
    source: Path,
    scratch: Path,
    select: str | None = None,
    folds: Sequence[str] | None = None,
    checkpoint: str = CHECKPOINT,
) -> Iterator[LocalModel]:
    """The files of a model while the block runs.

    Args:
        source: folder or zip file.
        scratch: an empty folder for what is unpacked.
        select: part of the name of the model's folder, where there are several.
        folds: None: all that have the checkpoint.
        checkpoint: name of the file in each fold.

    Raises:
        InvalidInput: nothing or several there, a fold that is not there, or a zip that is damaged or hostile.
    """
    source = Path(source)
    if source.is_dir():
        model = choose_model(models_in(_names_below(source), checkpoint), source, select, folds, checkpoint)
        yield _local(model, source, source.resolve().name)
    elif source.is_file():
        try:
            with open_archive(source, stays_inside, LIMITS) as (archive, files):
                model = choose_model(models_in((f.name for f in files), checkpoint), source, select, folds, checkpoint)
                _check_sizes([file for file in files if file.name in model.files()], source)
                for number, name in enumerate(model.files()):
                    unpack(archive, name, scratch / f"{number}_{PurePosixPath(name).name}")
        except InvalidInput as error:
            told = [replace(p, fix=ZIP_FIX if "autossl" in p.fix else p.fix) for p in error.problems]
            told = [replace(p, expected=p.expected.replace("autossl_export_model", "nnU-Net")) for p in told]
            raise InvalidInput(told) from error
        unpacked = [scratch / f"{number}_{PurePosixPath(name).name}" for number, name in enumerate(model.files())]
        checkpoints = dict(zip(model.folds, unpacked[2:], strict=True))
        name = PurePosixPath(model.root).name or source.stem
        yield LocalModel(unpacked[0], unpacked[1], checkpoints, name)
    else:
        raise InvalidInput(Problem("there is no such file or folder", EXPECTED, "check the path", file=source))


def stays_inside(name: str) -> bool:
    """Whether a name in a zip lies below the folder that the zip would be unpacked to, on any system."""
    if not name or any(character in name for character in "\\:\0") or name.startswith("/"):
        return False
    parts = name.removesuffix("/").split("/")
    return all(part not in ("", ".", "..") for part in parts) and name.isprintable()


def models_in(names: Iterable[str], checkpoint: str = CHECKPOINT) -> list[SourceModel]:
    """Models among the names of files ("/" between their parts): plans, dataset.json and at least one fold."""
    there = set(names)
    folds: dict[str, dict[str, str]] = {}
    for name in sorted(there):
        path = PurePosixPath(name)
        match = FOLD.match(path.parent.name)
        if path.name == checkpoint and match is not None:
            root = path.parent.parent.as_posix()
            folds.setdefault("" if root == "." else root, {})[match[1]] = name
    models = [SourceModel(root, dict(sorted(of.items(), key=_fold_order))) for root, of in sorted(folds.items())]
    return [model for model in models if {model.name(PLANS), model.name(DESCRIPTION)} <= there]


def choose_model(
    models: Sequence[SourceModel],
    source: Path,
    select: str | None = None,
    folds: Sequence[str] | None = None,
    checkpoint: str = CHECKPOINT,
) -> SourceModel:
    """The only model that fits, with the folds that were asked for.

    Raises:
        InvalidInput: none or several fit, or a fold is not there.
    """
    if not models:
        found = f"no folder in it holds {PLANS}, {DESCRIPTION} and fold_k/{checkpoint}"
        raise InvalidInput(Problem(found, EXPECTED, FIX, file=source))
    fitting = [model for model in models if select is None or select in (model.root or source.resolve().name)]
    if len(fitting) != 1:
        listed = ", ".join(model.root or source.name for model in fitting or models)
        fits = "fit" if select is None else f"fit --select {select}"
        found = f"{len(fitting)} models {fits}: {listed}" if fitting else f"no model fits --select {select}: {listed}"
        raise InvalidInput(Problem(found, "one model", "choose one with --select and a part of its name", file=source))
    (model,) = fitting
    missing = [fold for fold in folds or () if fold not in model.folds]
    if missing:
        found = f"no fold {', '.join(missing)} with {checkpoint}"
        expected = f"one of its folds: {', '.join(model.folds)}"
        raise InvalidInput(Problem(found, expected, "correct -f", file=source))
    return model if folds is None else replace(model, folds={fold: model.folds[fold] for fold in dict.fromkeys(folds)})


def _names_below(folder: Path) -> Iterator[str]:
    """Of the files that make a model, in the folder or somewhat below it."""
    for depth in range(LISTED_DEPTH + 1):
        above = "*/" * depth
        for pattern in (PLANS, DESCRIPTION, "fold_*/*.pth"):
            yield from (path.relative_to(folder).as_posix() for path in folder.glob(above + pattern))


def _fold_order(item: tuple[str, str]) -> tuple[int, int]:
    return (0, int(item[0])) if item[0].isdecimal() else (1, 0)


def _local(model: SourceModel, folder: Path, given_name: str) -> LocalModel:
    checkpoints = {fold: folder / name for fold, name in model.folds.items()}
    name = PurePosixPath(model.root).name or given_name
    return LocalModel(folder / model.name(PLANS), folder / model.name(DESCRIPTION), checkpoints, name)


def _check_sizes(files: Sequence[ArchiveFile], source: Path) -> None:
    """A zip may not unpack to far more than it holds."""
    unpacked, packed = (sum(getattr(file, which) for file in files) for which in ("n_bytes", "n_packed"))
    if unpacked > max(ALWAYS_ALLOWED_BYTES, MAX_INFLATION * packed):
        found = f"{packed:,} bytes that unpack to {unpacked:,}"
        raise InvalidInput(Problem(found, f"at most {MAX_INFLATION} times as many", ZIP_FIX, file=source))
