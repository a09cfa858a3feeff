"""A small sound data set, and the ways in which one can be unsound: each fault is put into a sound one by code."""

from __future__ import annotations

import gzip
import json
import os
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import numpy.typing as npt
import SimpleITK as sitk
from PIL import Image

NAME = "Dataset001_Small"
SIZE = 12
ENDING = ".nii.gz"
Put = Callable[[Path], object]
"""Given the data set's folder."""
DIM, PIXDIM, VOX_OFFSET, SLOPE, SFORM, DATATYPE = 40, 76, 108, 112, 280, 70
"""Offsets in a NIfTI-1 header."""


@dataclass(frozen=True)
class Fault:
    """How a data set is spoiled, and what the message has to say."""

    put_into: Put
    message: str
    """A regular expression for what was found."""
    file: str
    """Part of the path that the message names."""


def write_dataset(folder: Path, ending: str = ENDING) -> Path:
    """Three labeled cases a, b, c and an unlabeled one u, of one grey channel and one foreground class."""
    for number, (pool, case) in enumerate((("Tr", "a"), ("Tr", "b"), ("Tr", "c"), ("Un", "u"))):
        random = np.random.default_rng(number)
        shape = (1, SIZE * 2, SIZE * 2) if ending == ".png" else (SIZE, SIZE, SIZE)
        label = np.zeros(shape, np.uint8)
        label[..., 4:9, 3:8] = 1
        image = random.normal(100, 10, shape) + 50 * label
        write_image(folder / f"images{pool}" / f"{case}_0000{ending}", image.astype(np.uint8))
        if pool == "Tr":
            write_image(folder / "labelsTr" / f"{case}{ending}", label)
    describe(folder, file_ending=ending)
    return folder


def write_image(path: Path, array: npt.NDArray[Any], affine: npt.NDArray[Any] | None = None) -> Path:
    """An array [z,y,x] in the format of the path's ending."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".png":
        Image.fromarray(array[0]).save(path)
    elif path.suffix in (".mha", ".nrrd"):
        sitk.WriteImage(sitk.GetImageFromArray(array), str(path))
    else:
        nibabel.save(nibabel.Nifti1Image(array.T, np.eye(4) if affine is None else affine, dtype=array.dtype), path)
    return path


def describe(folder: Path, **changes: Any) -> None:
    """Writes dataset.json."""
    content = {"channel_names": {"0": "MR"}, "labels": {"background": 0, "organ": 1}, "file_ending": ENDING}
    (folder / "dataset.json").write_text(json.dumps(content | changes))


def image_of(folder: Path, case: str = "b", pool: str = "Tr") -> Path:
    """Of a case."""
    return folder / f"images{pool}" / f"{case}_0000{ENDING}"


def label_of(folder: Path, case: str = "b") -> Path:
    """Of a case."""
    return folder / "labelsTr" / f"{case}{ENDING}"


def with_bytes(path: Path, offset: int, kind: str, *values: float) -> None:
    """Overwrites a part of a compressed file's content."""
    content = bytearray(gzip.decompress(path.read_bytes()))
    struct.pack_into(f"<{kind}", content, offset, *values)
    path.write_bytes(gzip.compress(bytes(content), 1))


def _voxel(value: float) -> Put:
    def put(folder: Path) -> None:
        image = np.random.default_rng(0).normal(size=(SIZE,) * 3).astype(np.float32)
        image[3, 4, 5] = value
        write_image(image_of(folder), image)

    return put


def _image(array: npt.NDArray[Any], pool: str = "Tr", case: str = "b") -> Put:
    return lambda folder: write_image(image_of(folder, case, pool), array)


def _label(array: npt.NDArray[Any], affine: npt.NDArray[Any] | None = None) -> Put:
    return lambda folder: write_image(label_of(folder), array, affine)


def _header(offset: int, kind: str, *values: float, of: Callable[[Path], Path] = image_of) -> Put:
    return lambda folder: with_bytes(of(folder), offset, kind, *values)


def _content(change: Callable[[bytes], bytes]) -> Put:
    def put(folder: Path) -> None:
        image_of(folder).write_bytes(change(image_of(folder).read_bytes()))

    return put


def _text(name: str, text: str | bytes) -> Put:
    return lambda folder: (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())


def _json(**changes: Any) -> Put:
    return lambda folder: describe(folder, **changes)


def _named(name: str | bytes) -> Put:
    """A further unlabeled image of this name."""

    def put(folder: Path) -> None:
        text = name if isinstance(name, str) else os.fsdecode(name)
        (folder / "imagesUn" / text).write_bytes(image_of(folder).read_bytes())

    return put


def _huge_file(name: str) -> Put:
    """Two gigabytes that take no room on the disk."""

    def put(folder: Path) -> None:
        with (folder / name).open("ab") as file:
            file.truncate(2 << 30)

    return put


def _flipped(content: bytes) -> bytes:
    """One bit of the compressed voxels."""
    changed = bytearray(content)
    changed[len(content) * 2 // 3] ^= 4
    return bytes(changed)


def _bomb(content: bytes) -> bytes:
    """Far more zeros behind the voxels than the header asks for."""
    return content + gzip.compress(bytes(65 << 20), 1)


def _linked_to_itself(folder: Path) -> None:
    path = image_of(folder, "b")
    path.unlink()
    path.symlink_to(path.name)


def _linked(name: str) -> Put:
    """A file or folder is moved out of the data set, and a link to it left behind."""

    def put(folder: Path) -> None:
        outside = folder.parent.parent / "outside"
        outside.mkdir(exist_ok=True)
        moved = outside / Path(name).name
        (folder / name).rename(moved)
        (folder / name).symlink_to(moved)

    return put


def _emptied(folder: Path) -> None:
    for name in ("imagesTr", "labelsTr", "imagesUn"):
        for path in (folder / name).iterdir():
            path.unlink()


def _color_pictures(folder: Path) -> None:
    for path in sorted(folder.glob("*/*")):
        path.unlink()
    write_dataset(folder, ".png")
    color = np.random.default_rng(0).integers(0, 255, (2 * SIZE, 2 * SIZE, 3)).astype(np.uint8)
    Image.fromarray(color).save(folder / "imagesTr" / "b_0000.png")


def _in_another_file(ending: str) -> Put:
    """A header that takes any file of the machine for its voxels."""

    def put(folder: Path) -> None:
        for path in sorted(folder.glob("*/*")):
            path.unlink()
        write_dataset(folder, ending)
        path = folder / "imagesTr" / f"b_0000{ending}"
        secret = folder.parent.parent / "secret"
        secret.write_bytes(bytes(SIZE**3))
        content = path.read_bytes()
        if ending == ".mha":
            path.write_bytes(content[: content.index(b"ElementDataFile")] + f"ElementDataFile = {secret}\n".encode())
        else:
            path.write_bytes(content[: content.index(b"\n\n")] + f"\ndata file: {secret}\n".encode())

    return put


def _claims(ending: str) -> Put:
    """A header that claims 60000 voxels on each axis."""

    def put(folder: Path) -> None:
        for path in sorted(folder.glob("*/*")):
            path.unlink()
        write_dataset(folder, ending)
        path = folder / "imagesTr" / f"b_0000{ending}"
        size = f"{SIZE} {SIZE} {SIZE}".encode()
        path.write_bytes(path.read_bytes().replace(size, b"60000 60000 60000", 1))

    return put


def _removed(name: str) -> Put:
    return lambda folder: (folder / name).unlink()


RANDOM = np.random.default_rng(0)
NOISE = RANDOM.integers(0, 255, (SIZE,) * 3).astype(np.uint8)
ORGAN = (NOISE > 100).astype(np.uint8)
SHIFTED = np.eye(4) + np.pad(np.full((3, 1), 5.0), ((0, 1), (3, 0)))

FAULTS: dict[str, Fault] = {
    "nan": Fault(_voxel(np.nan), "1 of 1728 voxels are NaN", "b_0000"),
    "infinite": Fault(_voxel(np.inf), "1 of 1728 voxels are NaN or infinite", "b_0000"),
    "beyond all scanners": Fault(_voxel(1e30), "1 of 1728 voxels are NaN or infinite", "b_0000"),
    "nan, unlabeled": Fault(_image(np.full((SIZE,) * 3, np.nan, np.float32), "Un", "u"), "1728 of 1728", "u_0000"),
    "scale is nan": Fault(_header(SLOPE, "2f", 1, np.nan), "damaged NIfTI header", "b_0000"),
    "constant": Fault(_image(np.full((SIZE,) * 3, 7, np.uint8)), "every voxel is 7", "b_0000"),
    "one voxel": Fault(_image(np.full((1, 1, 1), 7, np.uint8)), "every voxel is 7", "b_0000"),
    "4D": Fault(_image(np.stack([NOISE, NOISE])), "an image of 12 x 12 x 12 x 2 voxels", "b_0000"),
    "complex": Fault(_image(NOISE.astype(np.complex64)), "voxels of type complex64", "b_0000"),
    "color volume": Fault(
        _image(np.zeros((SIZE,) * 3, [("R", "u1"), ("G", "u1"), ("B", "u1")])), "voxels of type", "b_0000"
    ),
    "color picture": Fault(_color_pictures, "3 channels in the file", "b_0000.png"),
    "zero spacing": Fault(_header(PIXDIM + 4, "f", 0.0), "a spacing of 0 x 1 x 1 mm", "b_0000"),
    "negative spacing": Fault(_header(PIXDIM + 12, "f", -1.0), "a spacing of 1 x 1 x -1 mm", "b_0000"),
    "spacing nan": Fault(_header(PIXDIM + 8, "f", np.nan), "a spacing of 1 x nan x 1 mm", "b_0000"),
    "spacing of a light year": Fault(_header(PIXDIM + 8, "f", 1e19), "a spacing of 1 x 1e[+]19 x 1 mm", "b_0000"),
    "flat axes": Fault(_header(SFORM, "8f", 1, 0, 0, 0, 1, 0, 0, 0), "axes span no volume", "b_0000"),
    "axes nan": Fault(_header(SFORM, "f", np.nan), "axes span no volume", "b_0000"),
    "unknown type of numbers": Fault(_header(DATATYPE, "h", 9999), "damaged NIfTI header", "b_0000"),
    "voxels far behind": Fault(_header(VOX_OFFSET, "f", 1e20), "its voxels begin at byte 1e[+]20", "b_0000"),
    "voxels nowhere": Fault(_header(VOX_OFFSET, "f", np.nan), "its voxels begin at byte nan", "b_0000"),
    "claims 30000 voxels per axis": Fault(
        _header(DIM, "4h", 3, 30000, 30000, 30000), "claims 30000 x 30000 x 30000 voxels.*the file has", "b_0000"
    ),
    "claims, MetaImage": Fault(_claims(".mha"), "claims 60000 x 60000 x 60000 voxels", "b_0000.mha"),
    "claims, NRRD": Fault(_claims(".nrrd"), "claims 60000 x 60000 x 60000 voxels", "b_0000.nrrd"),
    "negative size": Fault(_header(DIM + 2, "h", -5), "an image of -5 x 12 x 12", "b_0000"),
    "voxels elsewhere, MetaImage": Fault(_in_another_file(".mha"), "voxels are in another file", "b_0000.mha"),
    "voxels elsewhere, NRRD": Fault(_in_another_file(".nrrd"), "voxels are in another file", "b_0000.nrrd"),
    "bomb": Fault(_content(_bomb), "goes on for more than 64 MiB", "b_0000"),
    "cut off": Fault(_content(lambda content: content[: len(content) // 2]), "cut off or damaged", "b_0000"),
    "one bit flipped": Fault(_content(_flipped), "cut off or damaged", "b_0000"),
    "empty": Fault(_content(lambda content: b""), "the file is empty", "b_0000"),
    "no gzip": Fault(_content(lambda content: b"not an image\n" * 100), "no NIfTI header", "b_0000"),
    "wrong extension": Fault(
        lambda folder: (folder / "imagesTr" / "d_0000.nrrd").write_bytes(b"x"),
        "mixed file endings: d_0000.nrrd",
        "d_0000",
    ),
    "fractions": Fault(_label(ORGAN * np.float32(0.5)), "voxels of a label map are no label numbers, 0.5", "b.nii.gz"),
    "label nan": Fault(_label(np.full((SIZE,) * 3, np.nan, np.float32)), "no label numbers, nan", "b.nii.gz"),
    "labels 0 and 255": Fault(_label(ORGAN * np.uint8(255)), "undeclared label values: 255", "b.nii.gz"),
    "uint64 beyond": Fault(_label(ORGAN * np.uint64(2**63)), "no label numbers, 9223372036854775808", "b.nii.gz"),
    "int64 beyond": Fault(_label(ORGAN * np.int64(-(2**40))), "no label numbers, -1099511627776", "b.nii.gz"),
    "negative label": Fault(_label(ORGAN * np.int16(-1)), "undeclared label values: -1", "b.nii.gz"),
    "4D label": Fault(_label(np.stack([ORGAN, ORGAN])), "an image of 12 x 12 x 12 x 2 voxels", "b.nii.gz"),
    "label elsewhere": Fault(_label(ORGAN, SHIFTED), "origin shifted by", "b.nii.gz"),
    "label of another size": Fault(_label(ORGAN[1:]), "shape .11, 12, 12. against .12, 12, 12.", "b.nii.gz"),
    "label without image": Fault(_removed("imagesTr/b_0000.nii.gz"), "a label without an image", "b.nii.gz"),
    "no files": Fault(_emptied, "no labeled case", "labelsTr"),
    "a folder among images": Fault(lambda folder: (folder / "imagesTr" / "more").mkdir(), "a folder among", "more"),
    "names that clash": Fault(_named("A_0000.nii.gz"), "the id occurs twice.*there as 'a'", "A_0000"),
    "name with a line end": Fault(_named("x\ny_0000.nii.gz"), r"case id 'x\\ny_0000'", "imagesUn"),
    "name with an escape code": Fault(_named("x\x1b[2J_0000.nii.gz"), r"case id 'x\\x1b\[2J_0000'", "imagesUn"),
    "name that is no text": Fault(_named(b"x\xff_0000.nii.gz"), r"case id 'x\\udcff_0000'", "imagesUn"),
    "name with a colon": Fault(_named("C:x_0000.nii.gz"), "case id 'C:x_0000'", "imagesUn"),
    "name with a backslash": Fault(_named("a\\x_0000.nii.gz"), "path separator", "imagesUn"),
    "overlong name": Fault(_named("x" * 200 + "_0000.nii.gz"), "has 205 bytes, more than 180", "imagesUn"),
    "case above the folder": Fault(_text("cases.csv", "case,patient\n../../b,p\n"), "path separator", "cases.csv"),
    "absolute case": Fault(_text("cases.csv", "case,patient\n/etc/passwd,p\n"), "path separator", "cases.csv"),
    "case that is a folder": Fault(_text("cases.csv", "case,patient\n..,p\n"), "cannot be a file name", "cases.csv"),
    "overlong field": Fault(_text("cases.csv", 'case,patient\na,"' + "x" * 200_000 + '"\n'), "no table", "cases.csv"),
    "table in another encoding": Fault(_text("cases.csv", b"case\n\xff\xfe"), "not UTF-8 text", "cases.csv"),
    "table without cases": Fault(_text("cases.csv", "\x1b[2J,patient\n"), "the first line is", "cases.csv"),
    "link to an image": Fault(_linked("imagesTr/b_0000.nii.gz"), "symbolic link that leads out", "b_0000"),
    "link to a label": Fault(_linked("labelsTr/b.nii.gz"), "symbolic link that leads out", "b.nii.gz"),
    "link to a folder": Fault(_linked("imagesUn"), "symbolic link that leads out", "imagesUn"),
    "link to a description": Fault(_linked("dataset.json"), "symbolic link that leads out", "dataset.json"),
    "link to itself": Fault(_linked_to_itself, "the file does not exist", "b_0000"),
    "JSON of 2 GB": Fault(_huge_file("dataset.json"), "more than 64 MiB of text", "dataset.json"),
    "table of 2 GB": Fault(
        _huge_file("cases.csv"),
        "more than 64 MiB of text",
        "cases.csv",
    ),
    "deep JSON": Fault(_text("dataset.json", "[" * 100_000), "not valid JSON", "dataset.json"),
    "number of 10 000 digits": Fault(_text("dataset.json", "9" * 10_000), "not valid JSON", "dataset.json"),
    "half a sign": Fault(_text("dataset.json", r'{"labels": {"\ud800": 1}}'), "not valid JSON", "dataset.json"),
    "JSON cut off": Fault(_text("dataset.json", '{"labels": '), "not valid JSON", "dataset.json"),
    "JSON that is a list": Fault(_text("dataset.json", "[1]"), "valid dictionary", "dataset.json"),
    "JSON with NaN": Fault(_json(spacing=float("nan")), "NaN or an infinite number", "dataset.json"),
    "label name of two lines": Fault(
        _json(labels={"background": 0, "or\ngan": 1}), r"the name 'or\\ngan'", "dataset.json"
    ),
    "label number beyond": Fault(
        _json(labels={"background": 0, "organ": 10**9}), "values up to 1000000000", "dataset.json"
    ),
    "a million channels": Fault(
        _json(channel_names={str(n): "MR" for n in range(10**4)}), "10000 channels", "dataset.json"
    ),
    "no description": Fault(_removed("dataset.json"), "dataset.json missing", "Dataset001_Small"),
    "missing channel": Fault(_json(channel_names={"0": "T1", "1": "T2"}), "channels missing 0001", "imagesTr"),
}
