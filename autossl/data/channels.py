"""Image channels by name: one channel, or a group of channels that belong together (a modality)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from autossl.data.problems import InvalidInput, Problem, nearest

Channels = tuple[int, ...]
TOGETHER = "+"
"""Between the channels of a group that has no name of its own: T1+T2."""


@dataclass(frozen=True)
class ImageChannels:
    """The channels of a dataset's images and their groups, as dataset.json names them."""

    names: tuple[str, ...]
    """By channel number."""
    groups: Mapping[str, Channels] = field(default_factory=dict)

    @classmethod
    def numbered(cls, n: int) -> ImageChannels:
        """Channels without names."""
        return cls(tuple(str(number) for number in range(n)))

    def find(self, text: str) -> Channels:
        """Channel numbers of a group's name, a channel's name or number, or several of these joined by `+`.

        Upper and lower case are alike where that is clear.

        Raises:
            InvalidInput: unknown, with what there is; several channels have that name; or a channel stands there twice.
        """
        found = self._of_one(text.strip())
        if found is None and TOGETHER in text:
            parts = [self.find(part) for part in text.split(TOGETHER)]
            found = tuple(channel for part in parts for channel in part)
        if found is None:
            self._refuse(f"the channel '{text}' is unknown", text)
        elif len(set(found)) < len(found):
            self._refuse(f"'{text}' holds a channel twice", text)
        return found or ()

    def default_pair(self) -> tuple[Channels, ...]:
        """The first two groups, or the first two channels where there are not two groups."""
        groups = tuple(self.groups.values())
        return groups[:2] if len(groups) >= 2 else tuple((number,) for number in range(len(self.names)))[:2]

    def name_of(self, channels: Sequence[int]) -> str:
        """The group's name, or the channels' names joined by `+`; numbers where several channels have one name."""
        for name, members in self.groups.items():
            if set(members) == set(channels):
                return name
        names = [name if self.names.count(name) == 1 else str(number) for number, name in enumerate(self.names)]
        return TOGETHER.join(names[channel] for channel in channels)

    def listed(self, of: Iterable[Sequence[int]]) -> str:
        """Several sets of channels in words, for a message."""
        return ", ".join(self.name_of(channels) for channels in of)

    def _of_one(self, text: str) -> Channels | None:
        named = [*self.groups.items(), *((name, (number,)) for number, name in enumerate(self.names))]
        for same in (lambda name: name == text, lambda name: name.casefold() == text.casefold()):
            fitting = list(dict.fromkeys(tuple(channels) for name, channels in named if same(name)))
            if len(fitting) > 1:
                self._refuse(f"'{text}' is the name of several channels or groups", text)
            if fitting:
                return fitting[0]
        return (int(text),) if text.isdecimal() and int(text) < len(self.names) else None

    def _refuse(self, found: str, text: str) -> None:
        numbers = f"0 to {len(self.names) - 1}"
        raise InvalidInput(
            Problem(
                found,
                f"one of {nearest(text, {*self.groups, *self.names})}, or a channel number ({numbers})",
                "name channels and groups as dataset.json does (channel_names, channel_groups)",
            )
        )
