"""Times all metrics of one large case on one thread.

    OMP_NUM_THREADS=1 python benchmarks/metrics_speed.py [--shape 300 512 512] [--classes 10] [--repeats 3]
        [-o benchmarks/results/metrics_speed.json]

The case is made up: that many ellipsoids of the sizes of organs (the first as large as a liver) with rough surfaces; in
the prediction each is shifted and scaled by a few percent, so that the surfaces differ nearly everywhere. Reading files
is not in it. Beside the whole it times the parts, and the two distance transforms of a class's box that would be the
usual way.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from scipy import ndimage

from autossl.data.files import write_json
from autossl.data.labels import LabelSchema
from autossl.data.provenance import Written
from autossl.evaluation.case_scores import Scoring, Voxel, score_all
from autossl.evaluation.class_masks import class_masks
from autossl.evaluation.metrics import score_case, undeclared_values
from autossl.evaluation.surfaces import surface_metrics

SPACING = (1.5, 0.8, 0.8)


def main() -> None:
    """Parses, times, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", type=int, nargs=3, default=(300, 512, 512))
    parser.add_argument("--classes", type=int, default=10)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("-o", "--output", type=Path, default=Path("benchmarks/results/metrics_speed.json"))
    arguments = parser.parse_args()
    prediction, reference = made_up_case(tuple(arguments.shape), arguments.classes)
    machine = {"python": platform.python_version(), "platform": platform.platform(), "cpus": os.cpu_count()}
    content: dict[str, Any] = {
        "written": Written.now().model_dump(),
        "machine": machine | {"load_1_min": round(os.getloadavg()[0], 1)},
        "threads": os.environ.get("OMP_NUM_THREADS", "not limited"),
        "shape_zyx": list(arguments.shape),
        "spacing_zyx_mm": SPACING,
        "n_classes": arguments.classes,
        **measure(prediction, reference, arguments.classes, arguments.repeats),
    }
    write_json(arguments.output, content)
    print(json.dumps(content, indent=2))


def made_up_case(shape: tuple[int, ...], n_classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Prediction and reference, uint8 [z,y,x]."""
    generator = np.random.default_rng(0)
    maps = [np.zeros(shape, dtype=np.uint8) for _ in range(2)]
    for value in range(1, n_classes + 1):
        radii = generator.uniform(0.05, 0.12, 3) if value > 1 else np.full(3, 0.22)
        center = generator.uniform(0.25, 0.75, 3)
        for label_map, scale, shift in ((maps[1], 1.0, 0.0), (maps[0], 1.04, 0.01)):
            _draw(label_map, value, (center + shift) * shape, radii * scale * np.asarray(shape), generator)
    return maps[0], maps[1]


def _draw(
    label_map: np.ndarray, value: int, center: np.ndarray, radii: np.ndarray, generator: np.random.Generator
) -> None:
    low = np.maximum((center - 1.2 * radii).astype(int), 0)
    high = np.minimum((center + 1.2 * radii).astype(int) + 1, label_map.shape)
    box = tuple(slice(a, b) for a, b in zip(low, high, strict=True))
    axes = np.ogrid[box]
    distance = sum(((a - c) / r) ** 2 for a, c, r in zip(axes, center, radii, strict=True))
    waves = ndimage.zoom(generator.normal(0, 0.15, [max(n // 12, 2) for n in distance.shape]), 12, order=1)
    waves = np.pad(waves, [(0, max(n - m, 0)) for n, m in zip(distance.shape, waves.shape, strict=True)])
    label_map[box][distance + waves[tuple(slice(n) for n in distance.shape)] <= 1] = value


def measure(prediction: np.ndarray, reference: np.ndarray, n_classes: int, repeats: int) -> dict[str, Any]:
    """Seconds of the whole and of its parts, processor and clock, the least of the repeats."""
    schema = LabelSchema({"background": (0,), **{f"class_{n}": (n,) for n in range(1, n_classes + 1)}})
    voxel = Voxel(SPACING, float(np.prod(SPACING)))
    masks = dict(class_masks(prediction, reference, schema))
    largest = masks["class_1"]

    def surfaces() -> None:
        for _, own in class_masks(prediction, reference, schema):
            surface_metrics(own, SPACING, 1.0, "surface_elements", "mm")

    parts: dict[str, Callable[[], Any]] = {
        "all_metrics": lambda: score_all(prediction, reference, schema, voxel),
        "all_metrics_and_lesions": lambda: score_all(prediction, reference, schema, voxel, Scoring(lesions=True)),
        "border_voxels": lambda: score_all(
            prediction, reference, schema, voxel, Scoring(surface_convention="border_voxels")
        ),
        "undeclared_values_of_both": lambda: [undeclared_values(m, schema) for m in (prediction, reference)],
        "overlap_only": lambda: score_case(prediction, reference, schema, 1.0),
        "surfaces_only": surfaces,
        "surfaces_of_the_largest_class": lambda: surface_metrics(largest, SPACING, 1.0, "surface_elements", "mm"),
        "two_distance_transforms_of_its_box": lambda: [
            ndimage.distance_transform_edt(~mask, sampling=SPACING) for mask in (largest.prediction, largest.reference)
        ],
    }
    times = {name: [_seconds(part) for _ in range(repeats)] for name, part in parts.items()}
    return {
        "repeats": repeats,
        "box_of_the_largest_class": list(largest.prediction.shape),
        "foreground_share": round(float((reference > 0).mean()), 4),
        "cpu_seconds": {name: round(min(cpu for cpu, _ in taken), 3) for name, taken in times.items()},
        "wall_seconds": {name: round(min(wall for _, wall in taken), 3) for name, taken in times.items()},
    }


def _seconds(part: Callable[[], Any]) -> tuple[float, float]:
    """Of the processor, which another process's load leaves alone, and by the clock."""
    cpu, wall = time.process_time(), time.perf_counter()
    part()
    return time.process_time() - cpu, time.perf_counter() - wall


if __name__ == "__main__":
    main()
