"""Finding datasets by any of their names."""

from __future__ import annotations

from pathlib import Path

import pytest

from autossl.data.problems import InvalidInput
from autossl.data.workspace import Workspace


@pytest.fixture
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Workspace:
    monkeypatch.delenv("nnUNet_raw", raising=False)
    (tmp_path / "ws/raw/Dataset004_Hippocampus").mkdir(parents=True)
    (tmp_path / "ws/preprocessed/Dataset011_LGG").mkdir(parents=True)
    (tmp_path / "ws/results/Dataset011_LGG").mkdir(parents=True)
    return Workspace(tmp_path / "ws")


def test_locate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("AUTOSSL_WORKSPACE", raising=False)
    assert Workspace.locate().root == tmp_path / "autossl_workspace"
    monkeypatch.setenv("AUTOSSL_WORKSPACE", str(tmp_path / "env"))
    assert Workspace.locate().raw == tmp_path / "env/raw"
    assert Workspace.locate("given").results == tmp_path / "given/results"
    assert not list(tmp_path.iterdir()), "locating makes no folder"


@pytest.mark.parametrize("name", ["4", "004", 4, "Hippocampus", "Dataset004_Hippocampus", "Dataset004_Hippocampus/"])
def test_names_of_a_dataset(workspace: Workspace, name: str) -> None:
    assert workspace.find_dataset(name) == "Dataset004_Hippocampus"


def test_a_dataset_whose_raw_files_are_gone(workspace: Workspace) -> None:
    assert workspace.find_dataset("11") == "Dataset011_LGG"
    assert workspace.raw_folder("Dataset011_LGG") == workspace.raw / "Dataset011_LGG"


def test_nnunet_raw_is_searched_after_the_workspace(
    workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("Dataset004_Hippocampus", "Dataset012_Heads"):
        (tmp_path / "nn" / name).mkdir(parents=True)
    monkeypatch.setenv("nnUNet_raw", str(tmp_path / "nn"))
    assert workspace.find_dataset("12") == "Dataset012_Heads"
    assert workspace.raw_folder("Dataset012_Heads") == tmp_path / "nn/Dataset012_Heads"
    assert workspace.raw_folder(workspace.find_dataset("4")) == workspace.raw / "Dataset004_Hippocampus"


def test_two_matches(workspace: Workspace) -> None:
    (workspace.raw / "Dataset004_Other").mkdir()
    with pytest.raises(InvalidInput, match=r"2 datasets fit '4': Dataset004_Hippocampus in .*, Dataset004_Other in"):
        workspace.find_dataset(4)
    assert workspace.find_dataset("Other") == "Dataset004_Other"


def test_no_match_names_the_nearest(workspace: Workspace) -> None:
    with pytest.raises(InvalidInput, match=r"no dataset 'Hipocampus' in .*\(Hippocampus, LGG\).*--workspace"):
        workspace.find_dataset("Hipocampus")
    with pytest.raises(InvalidInput, match="Dataset011_LGG"):
        workspace.find_dataset("Dataset011_LG")
