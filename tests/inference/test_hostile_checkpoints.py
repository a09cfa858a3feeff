"""Ten checkpoints that want something run, or more memory than there is: nothing happens but a message."""

from __future__ import annotations

import importlib
import io
import os
import pickle
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from autossl.data.problems import InvalidInput
from autossl.data.torch_files import check_torch_file
from autossl.inference.checkpoint import FORMAT, read_checkpoint
from autossl.interop.foreign_checkpoint import read_foreign_checkpoint
from autossl.networks.encoders2d import read_encoder_weights

resource = pytest.importorskip("resource")

READERS: list[Callable[[Path], object]] = [read_checkpoint, read_foreign_checkpoint, read_encoder_weights]
FREE_BYTES = 1 << 30
"""What a test may take beyond what the process has."""


class Calls:
    """Pickled, it asks for a call; unpickled, it would have been made."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.parts = (function, arguments)

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self.parts


def saved(content: Any) -> bytes:
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()


def checkpoint_with(value: Any) -> bytes:
    return saved({"format": FORMAT, "networks": {"student": {"weight": torch.zeros(2)}}, "surprise": value})


def with_pickle(description: bytes, compression: int = zipfile.ZIP_STORED, **records: bytes) -> bytes:
    """A file like torch's, around any pickle."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as archive:
        for name, content in {"data.pkl": description, "byteorder": b"little", "version": b"3\n", **records}.items():
            archive.writestr(f"archive/{name.replace('_', '/')}", content)
    return file.getvalue()


def touch(path: Path) -> Calls:
    return Calls(os.system, f"touch '{path}'")


def by_pickle_alone(path: Path) -> bytes:
    """As torch saved before it had zip files: the pickle is the file."""
    return pickle.dumps({"format": FORMAT, "surprise": touch(path)})


def by_chain(path: Path) -> bytes:
    """getattr(import_module("os"), "system")(…): no harmful name stands in the file as such."""
    module = Calls(importlib.import_module, "os")
    system = Calls(getattr, module, "system")
    return with_pickle(protocol_2_call(pickle.dumps(system, 2), f"touch '{path}'"))


def protocol_2_call(function: bytes, argument: str) -> bytes:
    """The pickle of function(argument), for a function that is itself the result of a pickle."""
    text = argument.encode()
    return function[:-1] + b"X" + struct.pack("<I", len(text)) + text + b"\x85R."


def by_stack_names(path: Path) -> bytes:
    """Protocol 4 builds its names from texts."""
    return with_pickle(pickle.dumps({"format": FORMAT, "surprise": touch(path)}, 4))


def by_object_array(path: Path) -> bytes:
    array = np.empty(1, dtype=object)
    array[0] = touch(path)
    return checkpoint_with(array)


def by_state(path: Path) -> bytes:
    """An object of a harmless class, whose state is set by a function of the file's choice."""

    class Stateful:
        def __reduce__(self) -> Any:
            return (OrderedDict, (), {"x": 1}, None, None, os.system)

    return checkpoint_with(Stateful())


def by_script(path: Path) -> bytes:
    """A TorchScript archive: code of its own inside."""
    file = io.BytesIO()
    torch.jit.save(torch.jit.script(torch.nn.ReLU()), file)
    return file.getvalue()


def huge_claim(path: Path) -> bytes:
    """A tensor of 10¹² numbers in a storage of two."""
    return checkpoint_with(torch.zeros(1).expand(10**6, 10**6))


def huge_bytes(path: Path) -> bytes:
    """torch's own restricted reader calls bytearray(10¹¹) if it is asked to."""
    return checkpoint_with(Calls(bytearray, 10**11))


def packed_zeros(path: Path) -> bytes:
    """A storage that takes a thousandth of its size in the file."""
    good = io.BytesIO(saved({"format": FORMAT, "networks": {"student": {"weight": torch.zeros(2)}}}))
    file = io.BytesIO()
    with zipfile.ZipFile(good) as archive, zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as packed:
        for entry in archive.infolist():
            content = bytes(64 << 20) if "/data/" in entry.filename else archive.read(entry)
            packed.writestr(entry.filename, content)
    return file.getvalue()


def endless_text(path: Path) -> bytes:
    """A list that holds ten times a list that holds ten times …: small in memory, endless when shown."""
    value: Any = "x"
    for _ in range(40):
        value = [value] * 10
    return saved({"format": value})


HOSTILE: dict[str, tuple[Callable[[Path], bytes], str]] = {
    "os.system": (lambda path: checkpoint_with(touch(path)), "executed: .*system"),
    "os.system without a zip": (by_pickle_alone, "cannot be read"),
    "a chain of calls": (by_chain, "executed: .*getattr, importlib.import_module"),
    "names from texts": (by_stack_names, "executed: something by STACK_GLOBAL"),
    "an array of objects": (by_object_array, "executed: .*_reconstruct"),
    "a function that sets a state": (by_state, "executed: "),
    "TorchScript": (by_script, "executed: |cannot be read"),
    "a tensor of 4 TB": (huge_claim, "a tensor of shape .1000000, 1000000., for which"),
    "100 GB of bytes": (huge_bytes, "executed: .*bytearray"),
    "packed zeros": (packed_zeros, "compressed inside"),
}


@pytest.fixture
def little_memory() -> Any:
    """Whoever takes more than a gigabyte gets a MemoryError, which no reader turns into a message."""
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (taken + FREE_BYTES, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


def test_there_are_ten() -> None:
    assert len(HOSTILE) == 10


@pytest.mark.parametrize("name", HOSTILE)
def test_nothing_is_executed_and_no_memory_taken(name: str, tmp_path: Path, little_memory: None) -> None:
    make, message = HOSTILE[name]
    path, trace = tmp_path / "checkpoint.pth", tmp_path / "executed"
    path.write_bytes(make(trace))
    for reader in READERS:
        with pytest.raises(InvalidInput) as caught:
            reader(path)
        problem = caught.value.problems[0]
        assert problem.file == path
        assert problem.fix
    assert not trace.exists()
    with pytest.raises(InvalidInput, match=message):
        read_checkpoint(path)


def test_the_first_of_them_is_dangerous(tmp_path: Path) -> None:
    """Read without care, it does what it wants: the test above would see it."""
    path, trace = tmp_path / "checkpoint.pth", tmp_path / "executed"
    path.write_bytes(HOSTILE["os.system"][0](trace))
    torch.load(path, weights_only=False)
    assert trace.exists()


def test_a_message_is_never_endless(tmp_path: Path, little_memory: None) -> None:
    path = tmp_path / "checkpoint.pth"
    path.write_bytes(endless_text(path))
    with pytest.raises(InvalidInput, match="format is <class 'list'>"):
        read_checkpoint(path)


def test_a_description_that_is_too_long_to_read_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pth"
    path.write_bytes(with_pickle(b"0" * (5 << 20)))
    with pytest.raises(InvalidInput, match="too large"):
        check_torch_file(path)


def test_what_training_saves_is_on_the_list(tmp_path: Path) -> None:
    network = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(network.parameters())
    network(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    state = {"network": network.state_dict(), "optimizer": optimizer.state_dict(), "random": torch.get_rng_state()}
    path = tmp_path / "checkpoint.pth"
    torch.save({"format": FORMAT, **state, "sparse": None, "half": torch.zeros(2, dtype=torch.bfloat16)}, path)
    assert set(read_checkpoint(path)) == {"format", *state, "sparse", "half"}
