"""Peak memory of predicting one large volume with few and with many classes.

    python benchmarks/predict_memory.py [--shape 400 512 512] [--classes 2 15] [--spacing 1.0] [--step_size 0.5]
        [-o predict_memory.json]

A noise volume (z,y,x) with 1 mm voxels is written as NIfTI and predicted with random weights of a nano 3D network
(patch 48 cubed, 8 base features), reading and writing included, each in its own process. --spacing is the plan's target
spacing: other than 1.0 the image is resampled on the way in and the logits on the way back. Classes include background.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk
import torch
from versus.random_model import plans_3d, write_random_run

from autossl.planners.plans import Plans
from autossl.version import __version__

DATASET = "Dataset900_Large"
PEAK_CODE = """
import resource, sys
from pathlib import Path
from autossl.inference.predict import predict
from autossl.inference.request import PredictRequest
images, output, model, step = sys.argv[1:]
predict(PredictRequest(input=Path(images), output=Path(output), model=Path(model), device="cpu", mirroring=False,
                       step_size=float(step)))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def write_volume(folder: Path, shape: tuple[int, ...]) -> None:
    """One case of 16-bit noise."""
    folder.mkdir()
    noise = np.random.default_rng(0).integers(1, 1000, shape, dtype=np.int16)
    sitk.WriteImage(sitk.GetImageFromArray(noise), str(folder / "large_0000.nii.gz"), True, compressionLevel=1)


def measure(images: Path, root: Path, plans: Plans, n_classes: int, step_size: float) -> dict[str, Any]:
    """Peak resident memory and wall time of predicting the volume."""
    model = root / f"model_{n_classes}"
    labels = {"background": 0} | {f"class_{value}": value for value in range(1, n_classes)}
    write_random_run(model, plans, labels)
    command = [sys.executable, "-c", PEAK_CODE, str(images), str(root / f"out_{n_classes}"), str(model), str(step_size)]
    start = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=root)
    if done.returncode:
        raise SystemExit(done.stderr[-4000:])
    wall = time.perf_counter() - start
    unit = 1 if platform.system() == "Darwin" else 1024
    return {"classes": n_classes, "peak_gb": round(int(done.stdout.split()[-1]) * unit / 1e9, 3), "wall_s": round(wall)}


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", type=int, nargs=3, default=[400, 512, 512], metavar="N")
    parser.add_argument("--classes", type=int, nargs="+", default=[2, 15], metavar="N")
    parser.add_argument("--spacing", type=float, default=1.0, metavar="MM")
    parser.add_argument("--step_size", type=float, default=0.5, metavar="S")
    parser.add_argument("-o", "--output", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        write_volume(root / "images", tuple(arguments.shape))
        plans = plans_3d(DATASET, [48] * 3, (8, 16, 32, 64, 128), [arguments.spacing] * 3, batch_size=2)
        runs = [measure(root / "images", root, plans, n, arguments.step_size) for n in arguments.classes]
    asked = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    peaks = [run["peak_gb"] for run in runs]
    result = {
        "what": f"one volume {arguments.shape}, target spacing {arguments.spacing} mm, step {arguments.step_size}",
        "runs": runs,
        "most_above_least_gb": round(max(peaks) - min(peaks), 3),
        "target": "peak at most 5 GB, at most 1 GB above the 2-class run",
        "machine": {"cpus": os.cpu_count(), "page_bytes": resource.getpagesize()},
        "versions": {"autossl": __version__, "torch": torch.__version__, "python": platform.python_version()},
        "commit": subprocess.run(asked, capture_output=True, text=True, check=False).stdout.strip(),
    }
    text = json.dumps(result, indent=2)
    print(text)
    if arguments.output:
        arguments.output.write_text(text + "\n")


if __name__ == "__main__":
    main()
