"""What holds for any input: readers give a value or a stated error, writers give the grid back, schemas agree."""

from __future__ import annotations

import gzip
import json
import struct
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import nibabel
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from tiny_model import tiny_plans

from autossl.data.case_files import id_fault
from autossl.data.description import DatasetDescription
from autossl.data.image_io import read_geometry, read_image, read_label, write_label_map
from autossl.data.problems import InvalidInput
from autossl.planners.plans import Plans, read_plans

Result = TypeVar("Result")
THOROUGHLY = settings(max_examples=60, deadline=None, database=None, derandomize=True)

shapes = st.tuples(*[st.integers(1, 6)] * 3)
spacings = st.tuples(*[st.floats(0.05, 20.0)] * 3)
turns = st.tuples(st.permutations(range(3)), st.tuples(*[st.sampled_from((1.0, -1.0))] * 3), st.floats(0, 0.6))
plain = st.none() | st.booleans() | st.integers(-(10**12), 10**12) | st.floats() | st.text(max_size=20)
anything = st.recursive(
    plain, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4)
)


def tried(function: Callable[[], Result]) -> tuple[Result | None, InvalidInput | None]:
    """What the function gives, or the stated error that it raised; any other goes on."""
    try:
        return function(), None
    except InvalidInput as error:
        return None, error


def affine_of(spacing: Sequence[float], turn: tuple[Sequence[int], Sequence[float], float]) -> np.ndarray:
    """Axes in any order and direction, turned a little around z."""
    order, signs, angle = turn
    cos, sin = np.cos(angle), np.sin(angle)
    affine = np.eye(4)
    affine[:3, :3] = np.array([[cos, -sin, 0], [sin, cos, 0], [0, 0, 1]]) @ (np.eye(3)[list(order)] * signs) * spacing
    affine[:3, 3] = (-12.5, 40.25, 7.1)
    return affine


@THOROUGHLY
@given(shapes, spacings, turns, st.sampled_from([".nii", ".nii.gz"]), st.sampled_from(["uint8", "int16", "int32"]))
def test_a_label_map_comes_back_onto_the_grid_it_was_read_from(
    shape: tuple[int, int, int], spacing: tuple[float, float, float], turn: Any, ending: str, kind: str
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        given_file, written = Path(folder, f"given{ending}"), Path(folder, f"written{ending}")
        voxels = np.random.default_rng(0).integers(0, 100, shape).astype(kind)
        nibabel.save(nibabel.Nifti1Image(voxels, affine_of(spacing, turn)), given_file)
        label_map, _, geometry = read_label(given_file)
        write_label_map(written, label_map, geometry)
        before, after = nibabel.load(given_file), nibabel.load(written)
        np.testing.assert_array_equal(after.affine, before.affine)
        np.testing.assert_array_equal(after.header.get_zooms(), before.header.get_zooms())
        np.testing.assert_array_equal(np.asarray(after.dataobj), voxels)
        assert read_geometry(written) == geometry


@THOROUGHLY
@given(st.lists(st.tuples(st.integers(0, 351), st.binary(min_size=1, max_size=8)), min_size=1, max_size=3))
def test_any_header_is_read_or_refused_with_its_name(changes: list[tuple[int, bytes]]) -> None:
    content = bytearray(nibabel.Nifti1Image(np.arange(60, dtype=np.int16).reshape(3, 4, 5), np.eye(4)).to_bytes())
    for offset, value in changes:
        content[offset : offset + len(value)] = value
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "x.nii.gz")
        path.write_bytes(gzip.compress(bytes(content), 1))
        for reader in (lambda: read_image([path]).array, lambda: read_label(path)[0]):
            array, refused = tried(reader)
            assert (array is None) != (refused is None)
            assert array is None or array.size <= len(content)
            assert refused is None or (refused.problems[0].file == path and refused.problems[0].fix)


@THOROUGHLY
@given(st.integers(0, 2**62), st.sampled_from([1, 2, 3]))
def test_no_claimed_size_takes_memory_that_the_file_does_not_hold(size: int, axis: int) -> None:
    content = bytearray(nibabel.Nifti2Image(np.zeros((3, 4, 5), np.int16), np.eye(4)).to_bytes())
    struct.pack_into("<q", content, 16 + 8 * axis, size)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "x.nii")
        path.write_bytes(bytes(content))
        image, refused = tried(lambda: read_image([path]))
        assert image is None or image.array.size <= 60
        assert refused is None or refused.problems[0].file == path


names = st.text(st.characters(codec="utf-8"), min_size=1, max_size=8)
values = st.integers(-1, 6) | st.lists(st.integers(-1, 6), max_size=3)


@THOROUGHLY
@given(st.dictionaries(names | st.just("ignore"), values, max_size=4), st.none() | st.lists(st.integers(0, 6)))
def test_a_label_schema_agrees_with_itself(named: dict[str, Any], order: list[int] | None) -> None:
    content = {"channel_names": {"0": "MR"}, "labels": {"background": 0, **named}, "file_ending": ".nii.gz"}
    if order is not None:
        content["regions_class_order"] = order
    try:
        description = DatasetDescription.model_validate(content)
    except ValidationError:
        return
    schema = description.label_schema()
    assert DatasetDescription.model_validate(description.to_json()).label_schema() == schema
    assert len(schema.written_values) == schema.n_outputs
    every = np.array(schema.values)
    masks = schema.class_masks(every)
    assert list(masks) == list(schema.foreground)
    if schema.has_regions:
        written = schema.merge_outputs(list(masks.values()))
        assert set(written.tolist()) <= {0, *schema.written_values}
    else:
        together = np.sum(list(masks.values()), axis=0)
        assert together.tolist() == [value not in (0, schema.ignore_label) for value in every.tolist()]
    assert every.astype(schema.dtype).tolist() == every.tolist()


@THOROUGHLY
@given(st.text(max_size=12))
def test_a_case_id_that_is_taken_is_one_part_of_a_path(case: str) -> None:
    if id_fault(case) is None:
        assert Path(case).parts == (case,)
        assert case not in (".", "..")
        assert (Path("/data") / case).parent == Path("/data")
        assert "\n" not in case


def leaves(content: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Where every value of a nested content is."""
    entries = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else []
    return [path] * bool(path) + [leaf for key, value in entries for leaf in leaves(value, (*path, key))]


SOUND = tiny_plans().to_json()


@THOROUGHLY
@given(st.sampled_from(leaves(SOUND)), anything)
def test_plans_with_any_value_anywhere_are_refused_or_mean_what_they_say(place: tuple[Any, ...], value: Any) -> None:
    content = json.loads(json.dumps(SOUND))
    holder = content
    for key in place[:-1]:
        holder = holder[key]
    holder[place[-1]] = value
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "plans.json")
        path.write_text(json.dumps(content))
        plans, refused = tried(lambda: read_plans(path))
    assert refused is None or all(problem.file == path for problem in refused.problems)
    if plans is None:
        return
    again = Plans.model_validate(json.loads(json.dumps(plans.to_json())))
    assert again == plans
    for plan in plans.configurations.values():
        assert int(np.prod(plan.patch_size, dtype=object)) <= 2**27
        assert plan.labeled_batch_size <= 10**5
