"""Sound files made unsound: each mutation is drawn from the input's own generator, so an input can be made again."""

from __future__ import annotations

import copy
import csv
import gzip
import hashlib
import io
import json
import zipfile
from collections.abc import Callable, Sequence
from typing import Any

import nibabel
import numpy as np
import torch

Random = np.random.Generator
Mutated = tuple[bytes, str]
"""The content, and what was done to it."""

NUMBERS = (0, 1, -1, 2, 3, 0.5, -0.0, 1e-30, 1e30, 1e308, 255, 256, 2**31, 2**63, 10**9, 10**18, 10**400)
TEXTS = (
    "",
    " ",
    "x",
    "..",
    "../../x",
    "/etc/passwd",
    "a/b",
    "C:\\x",
    "\n",
    "\x1b[2J",
    "\u202e",
    "{0}",
    "%s%n",
    "x" * 300,
    "nan",
    "é",
)
VALUES: tuple[Any, ...] = (*NUMBERS, *TEXTS, None, True, False, [], {}, [[]], [0], {"0": 0}, float("nan"), float("inf"))
FLOAT_FIELDS = ("pixdim", "quatern_b", "qoffset_x", "srow_x", "srow_y", "srow_z", "scl_slope", "scl_inter", "cal_max")
FLOATS = (0, 1, -1, 0.1, 0.5, 0.9, 1.1, 2, 3, 10, 99, 1e-3, 1e-9, 1e3, 1e9, 1e38, np.nan, np.inf, -np.inf)
MILD = (0.3, 0.5, 0.9, 1.0, 1.1, 1.5, 2.0, 3.0)
CODES = {"qform_code": (0, 1, 2, 9, -1), "sform_code": (0, 1, 2, 9, -1), "xyzt_units": (0, 1, 2, 3, 10, 255)}
TYPES = (2, 4, 8, 16, 32, 64, 128, 256, 512, 768, 1024, 1280, 1536, 2304, 0, 1, 9999)


def mutated_nifti(sound: bytes, random: Random) -> Mutated:
    """Header and voxels are changed after unpacking and packed again; one in ten loses bytes of the packed file."""
    if random.random() < 0.1:
        return mutated_bytes(sound, random)
    content = bytearray(gzip.decompress(sound))
    header = nibabel.Nifti1Header(bytes(content[:348]), check=False)
    kind = random.choice(
        ["float", "mild", "code", "size", "type", "bytes", "voxels"], p=(0.2, 0.25, 0.1, 0.1, 0.1, 0.05, 0.2)
    )
    if kind == "voxels":
        return _packed(_with_odd_voxels(content, header, random), random), "nifti voxels"
    if kind == "bytes":
        for _ in range(random.integers(1, 4)):
            content[random.integers(0, 352)] = random.integers(0, 256)
        return _packed(content, random), "nifti header bytes"
    _change_field(header, str(kind), random)
    content[:348] = header.binaryblock
    return _packed(content, random), f"nifti {kind}"


def _change_field(header: Any, kind: str, random: Random) -> None:
    if kind in ("float", "mild"):
        name = str(random.choice(FLOAT_FIELDS))
        values = np.atleast_1d(header[name]).astype(np.float64)
        place = random.integers(1 if name == "pixdim" and kind == "mild" else 0, len(values))
        mild = kind == "mild"
        values[place] = values[place] * random.choice(MILD) if mild else random.choice(FLOATS)
        with np.errstate(over="ignore"):
            header[name] = values.reshape(np.shape(header[name]))
    elif kind == "code":
        name = str(random.choice(list(CODES)))
        header[name] = random.choice(CODES[name])
    elif kind == "type":
        header["datatype"] = random.choice(TYPES)
    else:
        size = header["dim"].copy()
        place = random.integers(0, 8)
        size[place] = random.choice([0, 1, 2, 3, 4, 5, 7, -1, 10, 20, 1000, 30000, size[1] - 1])
        header["dim"] = size if random.random() < 0.7 else [3, *random.permutation(size[1:4]), 1, 1, 1, 1]


def _with_odd_voxels(content: bytearray, header: Any, random: Random) -> bytearray:
    """Some voxels become what no scanner gives; or all of them; or there are fewer or more of them."""
    how = random.choice(["some", "same", "fewer", "more"], p=(0.6, 0.2, 0.1, 0.1))
    if how == "fewer":
        return content[: random.integers(352, len(content))]
    if how == "more":
        return content + random.bytes(int(random.integers(1, 5000)))
    kind = header.get_data_dtype().newbyteorder("<")
    voxels = np.frombuffer(bytes(content[352:]), kind).copy()
    odd = [0, 1, np.nan, np.inf, -1, 7, 255] if kind.kind == "f" else [0, 1, 2, 3, 7, 100]
    chosen = slice(None) if how == "same" else random.integers(0, len(voxels), random.integers(1, 50))
    voxels[chosen] = random.choice(odd)
    return content[:352] + voxels.tobytes()


def _packed(content: bytes | bytearray, random: Random) -> bytes:
    packed = gzip.compress(bytes(content), 1)
    return packed if random.random() < 0.97 else packed + gzip.compress(random.bytes(100), 1)


def mutated_bytes(sound: bytes, random: Random) -> Mutated:
    """Bits flipped, a part cut off, zeroed, repeated or inserted."""
    content = bytearray(sound)
    how = str(random.choice(["flip", "cut", "zero", "repeat", "insert"]))
    start = int(random.integers(0, max(1, len(content))))
    end = min(len(content), start + int(random.integers(1, 200)))
    if how == "flip":
        for _ in range(random.integers(1, 6)):
            content[random.integers(0, len(content))] ^= 1 << int(random.integers(0, 8))
    elif how == "cut":
        content = content[:start]
    elif how == "zero":
        content[start:end] = bytes(end - start)
    elif how == "repeat":
        content[end:end] = content[start:end]
    else:
        content[start:start] = random.bytes(end - start)
    return bytes(content), f"bytes: {how}"


def mutated_json(sound: bytes, random: Random) -> Mutated:
    """A value anywhere is replaced, scaled, removed, doubled or renamed; one in six is changed as bytes."""
    if random.random() < 1 / 6:
        return mutated_bytes(sound, random)
    content = json.loads(sound)
    what = change_value(content, random)
    return json.dumps(content).encode(), f"json {what}"


def change_value(content: Any, random: Random) -> str:
    """Changes one place of nested dicts and lists where it stands; says how."""
    holder, key = _places(content)[int(random.integers(0, len(_places(content))))]
    old = holder[key]
    number = isinstance(old, int | float) and not isinstance(old, bool)
    how = str(random.choice(["scale" if number else "replace", "replace", "remove", "double", "rename"]))
    if how == "scale":
        holder[key] = old * [0, -1, 0.5, 1.1, 2, 3, 10, 1000][int(random.integers(0, 8))]
    elif how == "replace":
        holder[key] = copy.deepcopy(VALUES[int(random.integers(0, len(VALUES)))])
    elif how == "remove":
        del holder[key]
    elif isinstance(holder, list):
        holder.insert(key, copy.deepcopy(old))
    else:
        holder[str(random.choice(TEXTS)) if how == "rename" else f"{key}2"] = copy.deepcopy(old)
        if how == "rename":
            holder.pop(key, None)
    return how


def _places(content: Any) -> list[tuple[Any, Any]]:
    """Every holder and key; weights as tensors are none."""
    entries = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    found: list[tuple[Any, Any]] = []
    for key, value in entries:
        found.append((content, key))
        found += _places(value)
    return found


def mutated_table(sound: bytes, random: Random) -> Mutated:
    """A cell, a row or the whole text is changed."""
    if random.random() < 0.2:
        return mutated_bytes(sound, random)
    rows = list(csv.reader(io.StringIO(sound.decode())))
    row, column = int(random.integers(0, len(rows))), int(random.integers(0, 3))
    how = str(
        random.choice(["cell", "swap", "double", "remove", "column", "quote"], p=(0.35, 0.2, 0.1, 0.1, 0.2, 0.05))
    )
    if how == "cell":
        rows[row][column] = str(random.choice(TEXTS))
    elif how == "swap":
        other = int(random.integers(0, len(rows)))
        rows[row][column], rows[other][column] = rows[other][column], rows[row][column]
    elif how == "double":
        rows.append(list(rows[row]))
    elif how == "remove":
        del rows[row]
    elif how == "column":
        rows = [[*cells, str(random.choice(TEXTS))] for cells in rows]
    text = "".join(",".join(cells) + "\n" for cells in rows)
    return (text + '"' if how == "quote" else text).encode(), f"table {how}"


def mutated_checkpoint(sound: bytes, random: Random) -> Mutated:
    """What describes the networks, weights, single records of the zip, or bytes."""
    kind = random.choice(["description", "weights", "record", "bytes"], p=(0.4, 0.35, 0.1, 0.15))
    if kind == "bytes":
        return mutated_bytes(sound, random)
    if kind == "record":
        return _changed_entry(sound, random, mutated_bytes), "checkpoint record"
    content = torch.load(io.BytesIO(sound), weights_only=True)
    if kind == "description":
        what = change_value({"prediction": content["prediction"]}, random)
    else:
        what = _change_weights(content["networks"], random)
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue(), f"checkpoint {kind} {what}"


def _change_weights(networks: Any, random: Random) -> str:
    state = networks["network"]
    name = list(state)[int(random.integers(0, len(state)))]
    old = state[name]
    changes: dict[str, Callable[[], Any]] = {
        "nan": lambda: torch.full_like(old, float("nan")),
        "huge": lambda: old * 1e30,
        "zero": lambda: old * 0,
        "noise": lambda: old + torch.from_numpy(random.normal(size=old.shape)).to(old.dtype),
        "half": lambda: old.half(),
        "double": lambda: old.double(),
        "integers": lambda: old.long(),
        "shape": lambda: old[None],
        "empty": lambda: old[:0],
        "expanded": lambda: old.reshape(-1)[:1].expand(10**5, 10**4),
        "no tensor": lambda: VALUES[int(random.integers(0, len(VALUES)))],
        "complex": lambda: old.to(torch.complex64),
    }
    what = str(random.choice([*changes, "missing", "surplus", "network"]))
    if what == "missing":
        del state[name]
    elif what == "surplus":
        state[str(random.choice(TEXTS))] = old
    elif what == "network":
        networks[str(random.choice(TEXTS))] = networks.pop("network")
    else:
        state[name] = changes[what]()
    return what


def mutated_archive(sound: bytes, random: Random) -> Mutated:
    """An entry is changed with its checksum corrected, renamed or doubled; or bytes of the whole."""
    kind = random.choice(["content", "name", "manifest", "bytes"], p=(0.6, 0.15, 0.1, 0.15))
    if kind == "bytes":
        return mutated_bytes(sound, random)
    if kind == "name":
        return _renamed_entry(sound, random), "archive name"
    names = zipfile.ZipFile(io.BytesIO(sound)).namelist()
    chosen = "manifest.json" if kind == "manifest" else str(random.choice([n for n in names if n != "manifest.json"]))
    what = ""

    def change(content: bytes, random: Random) -> Mutated:
        nonlocal what
        mutate = mutated_json if chosen.endswith(".json") else mutated_checkpoint
        changed, what = (
            mutate(content, random) if chosen.endswith((".json", ".pth")) else mutated_bytes(content, random)
        )
        return changed, what

    changed = _changed_entry(sound, random, change, chosen)
    return changed if kind == "manifest" else _with_new_checksum(changed, chosen), f"archive {kind} {what}"


def _entries(content: bytes) -> list[tuple[zipfile.ZipInfo, bytes]]:
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        return [(entry, archive.read(entry)) for entry in archive.infolist()]


def _zipped(entries: Sequence[tuple[zipfile.ZipInfo, bytes]]) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for entry, content in entries:
            archive.writestr(entry, content)
    return file.getvalue()


def _changed_entry(
    sound: bytes, random: Random, change: Callable[[bytes, Random], Mutated], name: str | None = None
) -> bytes:
    entries = _entries(sound)
    place = int(random.integers(0, len(entries)))
    if name is not None:
        place = next(i for i, (entry, _) in enumerate(entries) if entry.filename == name)
    entry, content = entries[place]
    entries[place] = (entry, change(content, random)[0] if content else random.bytes(20))
    return _zipped(entries)


def _renamed_entry(sound: bytes, random: Random) -> bytes:
    entries = _entries(sound)
    place = int(random.integers(0, len(entries)))
    entry, content = entries[place]
    odd = copy.copy(entry)
    odd.filename = str(random.choice(["../x", "/x", "a/../../x", "x", f"{entry.filename}x", "C:/x", "a\\b", "é", "."]))
    if random.random() < 0.2:
        odd.external_attr = 0o120777 << 16  # a symbolic link
    entries[place] = (odd, content)
    return _zipped(entries if random.random() < 0.7 else [*entries, (entry, content)])


def _with_new_checksum(content: bytes, name: str) -> bytes:
    entries = _entries(content)
    new = next(inner for entry, inner in entries if entry.filename == name)
    result = []
    for entry, inner in entries:
        if entry.filename == "manifest.json":
            manifest = json.loads(inner)
            manifest["files"][name] = {"n_bytes": len(new), "sha256": hashlib.sha256(new).hexdigest()}
            result.append((entry, json.dumps(manifest).encode()))
        else:
            result.append((entry, inner))
    return _zipped(result)
