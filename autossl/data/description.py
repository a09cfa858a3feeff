"""dataset.json: what the channels and labels of a raw dataset are, under nnU-Net v2's keys."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from autossl.data.channels import ImageChannels
from autossl.data.files import read_json
from autossl.data.image_io import FILE_ENDINGS
from autossl.data.labels import LabelSchema
from autossl.data.problems import InvalidInput, Problem, nearest, schema_faults

MAX_NAME = 200
MAX_LABEL = 65535
"""What uint16 holds, the type that label maps are written in."""
MAX_LABELS = 4096
"""Output channels of a network; memory would end long before."""
MAX_CHANNELS = 1024


class DatasetDescription(BaseModel):
    """The content of dataset.json. Keys that are not known here are kept."""

    model_config = ConfigDict(extra="allow", frozen=True)

    channel_names: dict[int, str] = Field(min_length=1)
    """Channel number from 0 → name; the name decides the normalization ("CT", say)."""
    labels: dict[str, int | tuple[int, ...]]
    """Name → label value, or values of a region; background is 0, "ignore" marks unannotated voxels."""
    file_ending: str
    regions_class_order: tuple[int, ...] | None = None
    channel_groups: dict[str, tuple[int, ...]] | None = None
    """Name → channels that belong together, for methods that treat them apart."""

    @field_validator("channel_names", mode="before")
    @classmethod
    def _list_of_channels(cls, value: Any) -> Any:
        return dict(enumerate(value)) if isinstance(value, list) else value

    @field_validator("channel_names")
    @classmethod
    def _channels_count_up(cls, value: dict[int, str]) -> dict[int, str]:
        if len(value) > MAX_CHANNELS:
            raise ValueError(f"{len(value)} channels, expected at most {MAX_CHANNELS}")
        if sorted(value) != list(range(len(value))):
            raise ValueError(f"channels are numbered {sorted(value)}, expected 0 to {len(value) - 1}")
        return dict(sorted(value.items()))

    @field_validator("labels", mode="before")
    @classmethod
    def _names_to_values(cls, value: Any) -> Any:
        if isinstance(value, dict) and value and all(str(k).isdigit() and isinstance(v, str) for k, v in value.items()):
            turned = {name: int(number) for number, name in value.items()}
            raise ValueError(f"labels map numbers to names, expected names to numbers: {turned}")
        return value

    @field_validator("file_ending")
    @classmethod
    def _known_ending(cls, value: str) -> str:
        if value not in FILE_ENDINGS:
            raise ValueError(f"'{value}' cannot be read, expected one of {nearest(value, FILE_ENDINGS)}")
        return value

    @model_validator(mode="before")
    @classmethod
    def _plain_content(cls, value: Any) -> Any:
        try:
            json.dumps(value, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise ValueError(f"NaN or an infinite number ({error})") from error
        return value

    @model_validator(mode="after")
    def _fits_together(self) -> DatasetDescription:
        faults = [*self._name_faults(), *self._label_faults(), *self._region_faults(), *self._group_faults()]
        if faults:
            raise ValueError("; ".join(faults))
        return self

    @property
    def n_channels(self) -> int:
        """Image channels."""
        return len(self.channel_names)

    @property
    def channels(self) -> ImageChannels:
        """Channels and their groups by name."""
        return ImageChannels(tuple(self.channel_names.values()), self.channel_groups or {})

    def label_schema(self) -> LabelSchema:
        """Labels, or regions where a name stands for several values."""
        return LabelSchema(self._values_by_name(), self.regions_class_order if self._has_regions() else None)

    def to_json(self) -> dict[str, Any]:
        """Plain values, unknown keys included, keys that were not given left out."""
        content = self.model_dump(mode="json", exclude_unset=True)
        return content | {"channel_names": {str(number): name for number, name in self.channel_names.items()}}

    def _values_by_name(self) -> dict[str, tuple[int, ...]]:
        return {name: (value,) if isinstance(value, int) else tuple(value) for name, value in self.labels.items()}

    def _has_regions(self) -> bool:
        return any(len(values) > 1 for values in self._values_by_name().values())

    def _name_faults(self) -> list[str]:
        """Names stand in tables, reports and file headers."""
        kinds: dict[str, Iterable[str]] = {
            "labels": self.labels,
            "channel_names": self.channel_names.values(),
            "channel_groups": self.channel_groups or (),
        }
        return [
            f"{kind}: the name {name[:80]!a} is empty, too long or holds signs that cannot be printed"
            for kind, names in kinds.items()
            for name in names
            if not name.strip() or len(name) > MAX_NAME or not name.isprintable()
        ]

    def _label_faults(self) -> list[str]:
        named = self._values_by_name()
        faults = [f"labels: '{name}' has the value {v}" for name, values in named.items() for v in values if v < 0]
        faults += [f"labels: '{name}' has no value" for name, values in named.items() if not values]
        if named.get("background") != (0,):
            faults.append('labels: "background" is missing or not 0')
        if len(named) < 2:
            faults.append("labels: no class besides the background")
        everything = [value for name, values in named.items() if name != "ignore" for value in values]
        if "ignore" in named and (len(named["ignore"]) != 1 or named["ignore"][0] <= max(everything, default=0)):
            faults.append('labels: "ignore" must be one value, higher than all others')
        if max(everything, default=0) > MAX_LABEL or len(named) > MAX_LABELS:
            faults.append(f"labels: {len(named)} of them, with values up to {max(everything, default=0)}")
        if not self._has_regions() and len(set(everything)) < len(everything):
            faults.append("labels: two names share a value")
        return faults

    def _region_faults(self) -> list[str]:
        if not self._has_regions():
            return []
        regions = [name for name in self.labels if name not in ("background", "ignore")]
        order = self.regions_class_order
        if order is None:
            return ["regions_class_order: missing, though a label stands for several values"]
        faults = []
        if len(order) != len(regions):
            faults.append(f"regions_class_order: {len(order)} values for the {len(regions)} regions {regions}")
        undeclared = set(order) - {value for values in self._values_by_name().values() for value in values}
        if undeclared:
            faults.append(f"regions_class_order: {sorted(undeclared)} are no label values")
        return faults

    def _group_faults(self) -> list[str]:
        return [
            f"channel_groups: '{name}' names channel {channel}, there are 0 to {self.n_channels - 1}"
            for name, channels in (self.channel_groups or {}).items()
            for channel in channels
            if channel not in self.channel_names
        ] + [
            f"channel_groups: '{name}' needs channels, each once"
            for name, channels in (self.channel_groups or {}).items()
            if not channels or len(set(channels)) < len(channels)
        ]


def read_description(path: Path) -> DatasetDescription:
    """Reads dataset.json (the file, or the folder that holds it).

    Raises:
        InvalidInput: with every fault found in it.
    """
    path = Path(path) / "dataset.json" if Path(path).is_dir() else Path(path)
    content = read_json(path)
    try:
        return DatasetDescription.model_validate(content)
    except ValidationError as error:
        example = 'channel_names {"0": "CT"}, labels {"background": 0, "liver": 1}, file_ending ".nii.gz"'
        expected = f"{example}, as in nnU-Net v2"
        problems = [Problem(fault, expected, "correct dataset.json", file=path) for fault in schema_faults(error)]
        raise InvalidInput(problems) from error
