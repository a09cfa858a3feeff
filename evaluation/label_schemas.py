"""The label schema that an evaluation goes by, where no dataset was named."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from autossl.data.description import read_description
from autossl.data.labels import LabelSchema
from autossl.data.problems import InvalidInput, Problem
from autossl.data.workspace import Workspace
from autossl.planners.fingerprint import read_fingerprint


def schema_of_labels(labels: Sequence[tuple[str, tuple[int, ...]]]) -> LabelSchema:
    """A schema from (name, label values) pairs; several values make a region, "ignore" marks unannotated voxels.

    Raises:
        InvalidInput: a name given twice, no foreground, or two classes that share a value though none is a region.
    """
    names = {"background": (0,)} | dict(labels)
    given = [name for name, _ in labels]
    faults = [f"the label {name} is given twice" for name in sorted({n for n in given if given.count(n) > 1})]
    if not set(names) - {"background", "ignore"}:
        faults.append("no class besides background and ignore")
    has_regions = any(len(values) > 1 for values in names.values())
    values = [value for own in names.values() for value in own]
    if not has_regions and len(set(values)) < len(values):
        faults.append("two labels share a value")
    if len(names.get("ignore", (0,))) > 1:
        faults.append("ignore has several values")
    if faults:
        raise InvalidInput(Problem("; ".join(faults), "--labels organ=1 core=2 (or whole=1,2)", "correct --labels"))
    regions = [values[-1] for name, values in names.items() if name not in ("background", "ignore")]
    return LabelSchema(names, tuple(regions) if has_regions else None)


def labels_of_dataset(dataset: str, workspace: Path | None = None) -> tuple[LabelSchema, dict[int, int]]:
    """The schema of a dataset, and the mapping OLD → NEW that its label files are read with (empty: none).

    Raises:
        InvalidInput: no such dataset, or its dataset.json cannot be used.
    """
    place = Workspace.locate(workspace)
    name = place.find_dataset(dataset)
    schema = read_description(place.raw_folder(name)).label_schema()
    fingerprint = place.preprocessed_folder(name) / "fingerprint.json"
    return schema, dict(read_fingerprint(fingerprint).remap_labels) if fingerprint.is_file() else {}


def find_label_schema(predictions: Path, references: Path) -> LabelSchema:
    """From the dataset.json that lies with the predictions, or beside the folder of references.

    Raises:
        InvalidInput: there is none.
    """
    for folder in (Path(predictions), Path(references).resolve().parent):
        if (folder / "dataset.json").is_file():
            return read_description(folder).label_schema()
    raise InvalidInput(
        Problem(
            "nothing says what the label values mean",
            f"dataset.json in {predictions} or beside {references}",
            "name the dataset with -d, or the labels with --labels organ=1 core=2",
        )
    )
