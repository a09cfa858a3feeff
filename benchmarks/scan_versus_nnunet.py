"""Times our scan of raw datasets against nnU-Net v2's fingerprint, in one run, and compares their numbers.

    python benchmarks/scan_versus_nnunet.py --nnunet_python ENV/bin/python --ours FOLDER [FOLDER …]
        --theirs FOLDER [FOLDER …] [--workers 2] [-o scan_versus_nnunet.json]

Ours: raw dataset folders. Theirs: the same datasets as nnU-Net is to read them (dataset.json may name its reorienting
reader). Both include process start and imports; ours also checks integrity, hashes images and measures class shapes.
ENV is an environment in which nnunetv2 is installed; it is only called through its interpreter.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

OURS = """
import sys
from pathlib import Path
from autossl.data.image_io import orientation_for
from autossl.data.raw_dataset import read_raw_dataset
from autossl.planners.fingerprint import ScanOptions, extract_fingerprint, write_fingerprint
raw = read_raw_dataset(Path(sys.argv[1]))
out = Path(sys.argv[2]) / raw.name
options = ScanOptions(folder=out)
found = extract_fingerprint(raw, orientation_for(raw.description.file_ending), int(sys.argv[3]), options=options)
write_fingerprint(out / "fingerprint.json", found)
"""
THEIRS = """
import sys
from nnunetv2.experiment_planning.dataset_fingerprint.fingerprint_extractor import DatasetFingerprintExtractor
if __name__ == "__main__":
    DatasetFingerprintExtractor(sys.argv[1], int(sys.argv[2])).run(overwrite_existing=True)
"""


def main() -> None:
    """Parses, measures, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nnunet_python", type=Path, required=True)
    parser.add_argument("--ours", type=Path, nargs="+", required=True)
    parser.add_argument("--theirs", type=Path, nargs="+", required=True)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("-o", "--output", type=Path, default=Path("scan_versus_nnunet.json"))
    arguments = parser.parse_args()
    results = {
        ours.name: _measure(ours, theirs, arguments.nnunet_python, arguments.workers)
        for ours, theirs in zip(arguments.ours, arguments.theirs, strict=True)
    }
    machine = {"python": platform.python_version(), "platform": platform.platform(), "cpus": os.cpu_count()}
    content = {"machine": machine, "workers": arguments.workers, "datasets": results}
    arguments.output.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    for name, result in results.items():
        print(name, json.dumps(result))


def _measure(ours: Path, theirs: Path, nnunet_python: Path, workers: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        scan = _timed([sys.executable, "-c", OURS, str(ours), folder, str(workers)], os.environ)
        script = Path(folder) / "theirs.py"
        script.write_text(THEIRS, encoding="utf-8")
        paths = {"nnUNet_raw": str(theirs.parent), "nnUNet_preprocessed": folder, "nnUNet_results": folder}
        extract = _timed([str(nnunet_python), str(script), theirs.name, str(workers)], os.environ | paths)
        mine = json.loads((Path(folder) / ours.name / "fingerprint.json").read_text(encoding="utf-8"))
        other = json.loads((Path(folder) / theirs.name / "dataset_fingerprint.json").read_text(encoding="utf-8"))
    return {"ours_s": round(scan, 2), "nnunet_s": round(extract, 2)} | _differences(mine, other)


def _timed(command: list[str], environment: Any) -> float:
    start = time.perf_counter()
    subprocess.run(command, check=True, env=dict(environment), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return time.perf_counter() - start


def _differences(mine: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    labeled = [case for case in mine["cases"].values() if case["pool"] == "labeled"]
    relative: dict[str, float] = {}
    for channel, properties in other["foreground_intensity_properties_per_channel"].items():
        for name, value in properties.items():
            found = mine["foreground_intensity_properties_per_channel"][channel][name]
            deviation = 0.0 if found == value else abs(found / value - 1)
            relative[name] = max(relative.get(name, 0.0), deviation)
    return {
        "spacings_equal": [case["spacing_zyx_mm"] for case in labeled] == other["spacings"],
        "shapes_equal": [case["shape_after_crop_zyx"] for case in labeled] == other["shapes_after_crop"],
        "median_relative_size_equal": mine["median_relative_size_after_cropping"]
        == other["median_relative_size_after_cropping"],
        "largest_relative_difference": relative,
    }


if __name__ == "__main__":
    main()
