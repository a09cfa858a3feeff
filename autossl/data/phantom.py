"""A small made-up 3D data set for demonstrations and tests: few labeled, more unlabeled and some test cases.

Each case shows a body with two nested organs (a capsule around a core) among look-alikes that are not labeled. Shapes
are deformed smoothly, tissues have texture, contrast changes from case to case, and a bias field, blur and noise lie
over everything: a threshold fails, a network with enough cases does not. Everything follows from the seed.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import nibabel
import numpy as np
import numpy.typing as npt
from scipy.ndimage import gaussian_filter, map_coordinates

from autossl.data.files import atomic_write, read_json, write_json
from autossl.data.problems import InvalidInput, Problem

FloatArray = npt.NDArray[np.float64]
BODY, CAPSULE, CORE, LOOK_ALIKE = 1, 2, 3, 4
LABELS = {"background": 0, "capsule": 1, "core": 2}
MEAN_INTENSITY = {BODY: 0.62, CAPSULE: 1.0, CORE: 0.42, LOOK_ALIKE: 0.95}
"""Before the case's own contrast; air is 0. The core is darker than the body, look-alikes are near the capsule."""
TEXTURE_SCALE_VOXELS = {BODY: 2.5, CAPSULE: 0.8, CORE: 1.6, LOOK_ALIKE: 1.6}
"""Standard deviation of the Gaussian that makes each tissue's grain; the capsule's is finer than its look-alikes'."""
TEXTURE_STRENGTH = 0.08
NOISE_STRENGTH = 0.05


@dataclass(frozen=True)
class PhantomSettings:
    """How many cases of what kind."""

    name: str = "Dataset999_Phantom"
    n_labeled: int = 5
    n_unlabeled: int = 16
    n_test: int = 8
    shape_zyx: tuple[int, int, int] = (20, 28, 28)
    """Mean size in voxels; every case differs by up to two voxels per axis."""
    spacing_zyx_mm: tuple[float, float, float] = (4.0, 3.2, 3.2)
    """Mean voxel size; every case differs by up to 8 % per axis."""
    seed: int = 0


@dataclass(frozen=True)
class PhantomCase:
    """One made-up case."""

    image: npt.NDArray[np.float32]
    """[z,y,x], no unit (like MR)."""
    label: npt.NDArray[np.uint8]
    """[z,y,x], values of `LABELS`."""
    spacing_zyx_mm: tuple[float, float, float]


def make_phantom_dataset(raw_folder: Path, settings: PhantomSettings | None = None) -> Path:
    """Writes the data set in the raw layout (imagesTr, labelsTr, imagesUn, imagesTs, labelsTs, dataset.json).

    Args:
        raw_folder: The folder that holds raw datasets; the dataset gets its own folder in it.
        settings: Numbers of cases, their size, and the seed.

    Returns:
        The dataset's folder.

    Raises:
        InvalidInput: The dataset's folder holds something else than the phantom of these settings.
    """
    settings = settings or PhantomSettings()
    folder = Path(raw_folder) / settings.name
    description = _description(settings)
    _refuse_other_content(folder, description)
    write_json(folder / "dataset.json", description)  # first: a run that was stopped here can be repeated
    case = 0
    for images, labels, number in (
        ("imagesTr", "labelsTr", settings.n_labeled),
        ("imagesUn", None, settings.n_unlabeled),
        ("imagesTs", "labelsTs", settings.n_test),
    ):
        for _ in range(number):
            case += 1
            made = make_phantom_case(settings, case)
            _write_nifti(folder / images / f"phantom_{case:03d}_0000.nii.gz", made.image, made.spacing_zyx_mm)
            if labels:
                _write_nifti(folder / labels / f"phantom_{case:03d}.nii.gz", made.label, made.spacing_zyx_mm)
    return folder


def make_phantom_case(settings: PhantomSettings, number: int) -> PhantomCase:
    """The case of this number: a pure function of (settings.seed, number) and of the mean shape and spacing."""
    random = np.random.default_rng([settings.seed, number])
    shape = tuple(int(n + random.integers(-2, 3)) for n in settings.shape_zyx)
    spacing = tuple(float(round(s * random.uniform(0.92, 1.08), 4)) for s in settings.spacing_zyx_mm)
    tissue = _tissues(shape, random)
    image = _intensities(tissue, random)
    label = np.zeros(shape, dtype=np.uint8)
    label[tissue == CAPSULE] = LABELS["capsule"]
    label[tissue == CORE] = LABELS["core"]
    return PhantomCase(image.astype(np.float32), label, (spacing[0], spacing[1], spacing[2]))


def _tissues(shape: tuple[int, ...], random: np.random.Generator) -> npt.NDArray[np.uint8]:
    """Tissue map [z,y,x]: 0 air, else the constants of this module."""
    points = _deformed_grid(shape, random)
    tissue = np.zeros(shape, dtype=np.uint8)
    tissue[_ellipsoid(points, np.zeros(3), np.array([0.95, 0.90, 0.93]), 0.0)] = BODY
    center = random.uniform(-0.16, 0.16, size=3)
    radii = random.uniform([0.40, 0.34, 0.42], [0.56, 0.46, 0.58])
    angle = random.uniform(-0.5, 0.5)
    for _ in range(int(random.integers(3, 6))):
        direction = random.normal(size=3)
        away = center + direction / np.linalg.norm(direction) * random.uniform(0.6, 0.75)
        blob = _ellipsoid(points, away, random.uniform(0.10, 0.24, size=3), random.uniform(-1, 1))
        tissue[blob & (tissue == BODY)] = LOOK_ALIKE
    tissue[_ellipsoid(points, center, radii, angle)] = CAPSULE
    core_center = center + radii * random.uniform(-0.22, 0.22, size=3)
    tissue[_ellipsoid(points, core_center, radii * random.uniform(0.52, 0.70), angle)] = CORE
    return tissue


def _deformed_grid(shape: tuple[int, ...], random: np.random.Generator) -> FloatArray:
    """Coordinates [3,z,y,x] from -1 to 1 along each axis, with a smooth displacement of about 0.08 added."""
    axes = [np.linspace(-1, 1, n) for n in shape]
    grid = np.stack(np.meshgrid(*axes, indexing="ij"))
    coarse = random.normal(scale=0.12, size=(3, 4, 4, 4))
    at = (grid + 1) * 1.5  # index into the 4 control points per axis
    return grid + np.stack([map_coordinates(field, at, order=3, mode="nearest") for field in coarse])


def _ellipsoid(points: FloatArray, center: FloatArray, radii: FloatArray, angle: float) -> npt.NDArray[np.bool_]:
    """Inside of an ellipsoid (z,y,x), turned by `angle` in radians about the z axis."""
    z, y, x = points - center[:, None, None, None]
    cosine, sine = np.cos(angle), np.sin(angle)
    turned = np.stack([z, cosine * y - sine * x, sine * y + cosine * x])
    return ((turned / radii[:, None, None, None]) ** 2).sum(axis=0) <= 1


def _intensities(tissue: npt.NDArray[np.uint8], random: np.random.Generator) -> FloatArray:
    """Image [z,y,x] of a tissue map: contrast, texture, blur, bias field, noise, in this order."""
    body = MEAN_INTENSITY[BODY]
    contrast = random.uniform(0.8, 1.2)
    image = np.zeros(tissue.shape)
    for kind, mean in MEAN_INTENSITY.items():
        grain = gaussian_filter(random.normal(size=tissue.shape), TEXTURE_SCALE_VOXELS[kind])
        level = body + (mean - body) * contrast + random.normal(scale=0.03)
        image = np.where(tissue == kind, level + TEXTURE_STRENGTH * grain / grain.std(), image)
    image = gaussian_filter(image, 0.6)
    axes = np.stack(np.meshgrid(*[np.linspace(-1, 1, n) for n in tissue.shape], indexing="ij"))
    slope, curve = random.uniform(-0.22, 0.22, size=(2, 3))
    bias = 1 + np.tensordot(slope, axes, axes=1) + np.tensordot(curve, axes**2 - 1 / 3, axes=1)
    noise = random.normal(scale=NOISE_STRENGTH, size=(2, *tissue.shape))
    scale = random.uniform(300, 700)
    return scale * np.hypot(image * np.clip(bias, 0.4, None) + noise[0], noise[1])  # Rician, as in MR magnitude images


def _description(settings: PhantomSettings) -> dict[str, object]:
    return {
        "channel_names": {"0": "MR"},
        "labels": LABELS,
        "numTraining": settings.n_labeled,
        "file_ending": ".nii.gz",
        "description": f"Made by autossl from seed {settings.seed}: "
        f"{settings.n_labeled} labeled, {settings.n_unlabeled} unlabeled, {settings.n_test} test cases "
        f"of about {' x '.join(str(n) for n in settings.shape_zyx)} voxels",
    }


def _refuse_other_content(folder: Path, description: dict[str, object]) -> None:
    """Raises where the folder holds anything that writing the same phantom again would not have made."""
    if not folder.exists() or not any(folder.iterdir()):
        return
    written = folder / "dataset.json"
    if written.exists() and read_json(written) == description:
        return
    raise InvalidInput(
        Problem(
            "the folder exists and holds something else than this phantom data set",
            "an empty or new folder, or the phantom of the same settings",
            "name another folder, or delete this one",
            file=folder,
        )
    )


def _write_nifti(path: Path, array: npt.NDArray[np.generic], spacing_zyx_mm: tuple[float, float, float]) -> None:
    """Writes [z,y,x] as NIfTI whose stored x and y run to the left and the back, as most scanners' do."""
    z, y, x = spacing_zyx_mm
    affine = np.diag([-x, -y, z, 1.0])
    affine[:3, 3] = (x * array.shape[2] / 2, y * array.shape[1] / 2, -z * array.shape[0] / 2)
    with atomic_write(path) as partial:
        nibabel.save(nibabel.Nifti1Image(array.transpose(2, 1, 0), affine), partial)
