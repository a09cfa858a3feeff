"""Archives from strangers: whatever they hold, nothing is executed and nothing lands outside of the model's folder."""

from __future__ import annotations

import hashlib
import io
import json
import pickle
import stat
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_model import DATASET, write_tiny_run

from autossl.data.archive_files import MAX_TEXT_BYTES, check_stored_only
from autossl.data.problems import InvalidInput
from autossl.interop import model_install
from autossl.interop.model_archive import ExportRequest, belongs_into_archive, export_model
from autossl.interop.model_install import InstallRequest, install_model

WEIGHTS = "run/fold_0/checkpoint_final.pth"
RULE = {"kind": "keep_largest", "class_name": "x"}
Files = dict[str, bytes]


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Files:
    """Content of an archive that can be installed."""
    folder = tmp_path_factory.mktemp("good")
    export_model(ExportRequest(write_tiny_run(folder / "run"), folder / "model.zip"))
    with zipfile.ZipFile(folder / "model.zip") as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def with_manifest(files: Files, **changes: Any) -> Files:
    """The files with sizes and checksums that fit them."""
    rest = {name: content for name, content in files.items() if name != "manifest.json"}
    manifest = json.loads(files["manifest.json"])
    manifest["files"] = {
        name: {"n_bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()} for name, content in rest.items()
    }
    return {"manifest.json": json.dumps(manifest | changes).encode(), **rest}


def write(path: Path, files: Mapping[str, bytes], compressed: tuple[str, ...] = ()) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            deflate = name.endswith(".json") or name in compressed
            archive.writestr(name, content, zipfile.ZIP_DEFLATED if deflate else zipfile.ZIP_STORED)
    return path


def refused(path: Path, message: str, **more: Any) -> None:
    """Installing says so, and nothing has appeared anywhere."""
    before = sorted(path.parent.rglob("*"))
    with pytest.raises(InvalidInput, match=message) as caught:
        install_model(InstallRequest(path, path.parent / "workspace", **more))
    assert all(problem.file == path for problem in caught.value.problems)
    assert sorted(path.parent.rglob("*")) == before


def test_what_the_others_are_made_from_can_be_installed(tmp_path: Path, good: Files) -> None:
    installed = install_model(InstallRequest(write(tmp_path / "m.zip", with_manifest(good)), tmp_path / "w"))
    assert (installed.folder / WEIGHTS).is_file()
    for name, content in good.items():
        assert belongs_into_archive(name)
        assert (installed.folder / name).read_bytes() == content or name == "manifest.json"


@pytest.mark.parametrize(
    "name",
    [
        "../escape.json",
        "run/../../escape.json",
        "/tmp/escape.json",
        "C:/escape.json",
        "C:run/plans.json",
        "run\\..\\..\\escape.json",
        "\\\\server\\share\\plans.json",
        "..",
        "run/..plans.json",
        "run/.hidden/plans.json",
        ".hidden/plans.json",
        "run./plans.json",
        "run/fold_0/checkpoint_final.pth/x",
        "run/fold_../checkpoint_final.pth",
        "run/fold_0/code.py",
        "run/plans.json\n",
        "run/",
        "run/deeper/plans.json",
        "setup.py",
        "run/plans.json\0.txt",
    ],
)
def test_no_file_leaves_the_folder_or_is_of_another_kind(tmp_path: Path, good: Files, name: str) -> None:
    assert not belongs_into_archive(name)
    files = with_manifest({**good, name: b"{}"})
    with zipfile.ZipFile(tmp_path / "m.zip", "w") as archive:
        for key, content in files.items():
            entry = zipfile.ZipInfo("placeholder")
            entry.filename = key  # the constructor would tidy it
            archive.writestr(entry, content)
    refused(tmp_path / "m.zip", "only the files of a model|directory and header differ")


def test_links_are_refused(tmp_path: Path, good: Files) -> None:
    with zipfile.ZipFile(write(tmp_path / "m.zip", good), "a") as archive:
        entry = zipfile.ZipInfo("other/plans.json")
        entry.external_attr = (stat.S_IFLNK | 0o777) << 16
        archive.writestr(entry, "/etc/passwd")
    refused(tmp_path / "m.zip", "is a link")


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize("name", ["run/plans.json", "RUN/Plans.json", "run/PLANS.json"])
def test_a_file_is_there_once_in_any_spelling(tmp_path: Path, good: Files, name: str) -> None:
    with zipfile.ZipFile(write(tmp_path / "m.zip", good), "a") as archive:
        archive.writestr(name, b"{}")
    refused(tmp_path / "m.zip", "is there twice")


def test_texts_that_unpack_to_too_much_are_refused_by_their_directory_entry(tmp_path: Path, good: Files) -> None:
    half = b" " * (MAX_TEXT_BYTES // 2)
    files = with_manifest({**good, "a/plans.json": half, "b/plans.json": half})
    path = write(tmp_path / "m.zip", files)
    assert path.stat().st_size < 100_000
    refused(path, "compressed files that unpack to")


def test_a_directory_that_lies_about_a_size_gets_no_more_than_it_said(tmp_path: Path, good: Files) -> None:
    bomb = {**good, "run/plans.json": b" " * (8 * MAX_TEXT_BYTES)}
    content = bytearray(write(tmp_path / "m.zip", bomb).read_bytes())
    start = content.rindex(b"PK\1\2", 0, content.rindex(b"run/plans.json"))
    content[start + 24 : start + 28] = (1000).to_bytes(4, "little")
    (tmp_path / "m.zip").write_bytes(content)
    refused(tmp_path / "m.zip", "has 1,000 bytes, the manifest says")


def test_weights_that_are_compressed_or_share_their_bytes_are_refused(tmp_path: Path, good: Files) -> None:
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    big = with_manifest({**good, WEIGHTS: b"\0" * (2 * MAX_TEXT_BYTES)})
    refused(write(tmp_path / "one" / "m.zip", big, (WEIGHTS,)), "compressed files that unpack to")
    other = WEIGHTS.replace("fold_0", "fold_1")
    path = write(tmp_path / "two" / "m.zip", {**good, other: good[WEIGHTS]})
    content = bytearray(path.read_bytes())
    entries = [content.rindex(b"PK\1\2", 0, content.rindex(name.encode())) for name in (WEIGHTS, other)]
    content[entries[1] + 42 : entries[1] + 46] = content[entries[0] + 42 : entries[0] + 46]
    path.write_bytes(content)
    refused(path, "share their bytes")


@pytest.mark.parametrize(("at", "value"), [(10, b"\xff\xff"), (12, b"\0\0\x40\0")])
def test_a_directory_too_large_to_read_is_never_read(
    tmp_path: Path, good: Files, at: int, value: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = bytearray(write(tmp_path / "m.zip", good).read_bytes())
    start = len(content) - 22 + at  # the number of files, the size in bytes
    content[start : start + len(value)] = value
    (tmp_path / "m.zip").write_bytes(content)
    monkeypatch.setattr(zipfile, "ZipFile", lambda *_: pytest.fail("it was opened"))
    refused(tmp_path / "m.zip", "a directory of")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content: content[: len(content) // 2], "does not end as a zip file"),
        (lambda content: content[:-1], "does not end as a zip file"),
        (lambda content: b"", "does not end as a zip file"),
        (lambda content: b"prefix" + content, "not where it should be"),
        (lambda content: content + b"x", "does not end as a zip file"),
    ],
)
def test_files_that_are_no_whole_archive(
    tmp_path: Path, good: Files, change: Callable[[bytes], bytes], message: str
) -> None:
    path = write(tmp_path / "m.zip", good)
    path.write_bytes(change(path.read_bytes()))
    refused(path, message)


def test_a_changed_byte_is_noticed(tmp_path: Path, good: Files) -> None:
    path = write(tmp_path / "m.zip", good)
    content = bytearray(path.read_bytes())
    content[content.index(good[WEIGHTS][:200]) + 5000] ^= 1
    path.write_bytes(content)
    refused(path, "is damaged")
    changed = bytes([*good[WEIGHTS][:-1], good[WEIGHTS][-1] ^ 1])
    refused(write(path, {**good, WEIGHTS: changed}), "not what the manifest says")


def other_json(files: Files, name: str, **changes: Any) -> Files:
    return with_manifest({**files, name: json.dumps(json.loads(files[name]) | changes).encode()})


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (lambda f: {k: v for k, v in f.items() if k != "manifest.json"}, "there is no manifest.json"),
        (lambda f: {k: v for k, v in f.items() if k != "run/run.json"}, "'run/run.json' is missing"),
        (lambda f: {**f, "more/run.json": b"{}"}, "'more/run.json' is not in the manifest"),
        (lambda f: {**f, "manifest.json": b"{"}, "manifest.json is no JSON"),
        (lambda f: {**f, "manifest.json": b"[" * 100_000}, "manifest.json is no JSON"),
        (lambda f: with_manifest(f, format="autossl-model-9"), "format"),
        (lambda f: with_manifest(f, dataset="../Dataset001_X"), "the dataset's name"),
        (lambda f: with_manifest(f, dataset="Dataset001_a/../../b"), "the dataset's name"),
        (lambda f: with_manifest(f, dataset="Dataset001_X\n"), "the dataset's name"),
        (lambda f: with_manifest(f, name="../../x"), "the folder's name"),
        (lambda f: with_manifest(f, dataset="Dataset001_Other"), "another dataset"),
        (lambda f: with_manifest({**f, "run/plans.json": b"[" * 100_000}), "not valid JSON"),
        (lambda f: with_manifest({**f, "run/plans.json": b"9" * 9000}), "not valid JSON"),
        (lambda f: with_manifest({**f, "run/run.json": b"\xff"}), "run/run.json: "),
        (lambda f: other_json(f, "inference_plan.json", members=[{"run": "../../x", "folds": ["0"]}]), "members"),
        (lambda f: other_json(f, "inference_plan.json", members=[{"run": "x/y/else", "folds": ["0"]}]), "other runs"),
        (lambda f: other_json(f, "inference_plan.json", members=[{"run": "x/y/run", "folds": ["1"]}]), "other runs"),
        (
            lambda f: other_json(
                f, "inference_plan.json", postprocessing=[{"kind": "keep_largest", "class_name": "x"}]
            ),
            "no class 'x'",
        ),
        (lambda f: other_json(f, "run/run.json", dataset="Dataset001_Other"), "the plan is for"),
        (lambda f: other_json(f, "run/dataset.json", labels={"background": 0, "a": 1}), "has the shape"),
    ],
)
def test_contents_that_do_not_fit_together(
    tmp_path: Path, good: Files, files: Callable[[Files], Files], message: str
) -> None:
    refused(write(tmp_path / "m.zip", files(good)), message)


class Surprise:
    """Would be called by an unpickler that trusts its file."""

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path("/tmp/autossl-was-here"),)


def saved(content: Any) -> bytes:
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()


def changed_weights(good: Files, change: Callable[[dict[str, Any]], None]) -> bytes:
    content = torch.load(io.BytesIO(good[WEIGHTS]), weights_only=True)
    change(content)
    return saved(content)


def set_layers(content: dict[str, Any], layers: int) -> None:
    content["prediction"]["members"][0]["architecture"]["arch_kwargs"]["n_conv_per_stage"] = layers


def set_weight(content: dict[str, Any], change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    state = content["networks"]["student"]
    name = next(name for name in state if name.endswith("conv.weight"))
    state[name] = change(state[name])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(networks=Surprise()), "would have to be executed"),
        (lambda c: c.update(format="other"), "format is"),
        (lambda c: c["networks"].clear(), "no weights for network"),
        (lambda c: c["networks"]["student"].popitem(), "missing or too many"),
        (lambda c: set_layers(c, 10**9), "n_conv_per_stage is 1000000000"),
        (lambda c: set_layers(c, 3), "missing or too many"),
        (lambda c: set_weight(c, lambda w: torch.zeros(1).expand(w.shape)), "claims more numbers than are stored"),
        (lambda c: set_weight(c, lambda w: w.to("meta")), "have to be executed"),
        (lambda c: set_weight(c, lambda w: w.to_sparse()), "have to be executed"),
        (lambda c: set_weight(c, lambda w: w[:1]), "has the shape"),
    ],
)
def test_weights_that_are_not_those_of_the_plan(
    tmp_path: Path, good: Files, change: Callable[[dict[str, Any]], None], message: str
) -> None:
    path = write(tmp_path / "m.zip", with_manifest({**good, WEIGHTS: changed_weights(good, change)}))
    refused(path, message)
    assert not Path("/tmp/autossl-was-here").exists()


def test_other_kinds_of_weights(tmp_path: Path, good: Files) -> None:
    for content in (pickle.dumps(Surprise()), b"", b"PK"):
        refused(write(tmp_path / "m.zip", with_manifest({**good, WEIGHTS: content})), "as a zip file does")
    packed = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(good[WEIGHTS])) as source, zipfile.ZipFile(packed, "w", 8) as target:
        for entry in source.namelist():
            target.writestr(entry, source.read(entry))
    (tmp_path / "packed.pth").write_bytes(packed.getvalue())
    with pytest.raises(InvalidInput, match="compressed inside"):
        check_stored_only(tmp_path / "packed.pth")
    refused(write(tmp_path / "m.zip", with_manifest({**good, WEIGHTS: packed.getvalue()})), "compressed inside")
    assert not Path("/tmp/autossl-was-here").exists()


def test_what_is_there_is_never_lost(tmp_path: Path, good: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    archive, target = write(tmp_path / "m.zip", good), tmp_path / "w" / "results" / DATASET / "installed-default"
    write_tiny_run(target / "own")
    for overwrite in (False, True):
        with pytest.raises(InvalidInput, match="holds no installed model"):
            install_model(InstallRequest(archive, tmp_path / "w", overwrite=overwrite))
    assert (target / "own" / "run.json").is_file()
    first = install_model(InstallRequest(archive, tmp_path / "w", "mine"))
    assert first.folder == target.with_name("installed-mine")
    assert install_model(InstallRequest(archive, tmp_path / "w", "mine")).already
    other = write(tmp_path / "other.zip", with_manifest({**good, "model_card.md": b"another"}))
    with pytest.raises(InvalidInput, match="another model is installed there"):
        install_model(InstallRequest(other, tmp_path / "w", "mine"))

    def is_staged(path: Path) -> bool:
        return path.parts[-3] == "results" and path.parts[-4].startswith(model_install.STAGING_PREFIX)

    def fails(*_: Any) -> None:
        raise OSError("the disk went away")

    rename = Path.rename
    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", lambda p, t: fails() if is_staged(p) else rename(p, t))
        with pytest.raises(OSError, match="went away"):
            install_model(InstallRequest(other, tmp_path / "w", "mine", overwrite=True))
    assert first.card.read_bytes() == good["model_card.md"]
    install_model(InstallRequest(other, tmp_path / "w", "mine", overwrite=True))
    assert first.card.read_bytes() == b"another"
    assert sorted(path.name for path in target.parent.iterdir()) == ["installed-default", "installed-mine"]


def test_a_disk_without_room_is_noticed_before(tmp_path: Path, good: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    archive = write(tmp_path / "m.zip", good)
    usage = model_install.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(model_install.shutil, "disk_usage", lambda _: usage._replace(free=1000))
    monkeypatch.setattr(model_install, "unpack", lambda *_: pytest.fail("it was unpacked"))
    with pytest.raises(InvalidInput, match="1,000 bytes are free"):
        install_model(InstallRequest(archive, tmp_path / "w"))
    assert [path.name for path in tmp_path.iterdir()] == ["m.zip"]


@pytest.mark.parametrize("name", ["../x", "a/b", "", "x\n", "a..b/"])
def test_names_that_are_no_folder_of_their_own(tmp_path: Path, good: Files, name: str) -> None:
    path = write(tmp_path / "m.zip", good)
    if not name:
        assert install_model(InstallRequest(path, tmp_path / "w", name)).folder.name == "installed-default"
        return
    with pytest.raises(InvalidInput, match="choose another --name"):
        install_model(InstallRequest(path, tmp_path / "w", name))
