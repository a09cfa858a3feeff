"""Jobs for nnU-Net's interpreter, which does not know autossl: python in_nnunet.py JOB TASK.json ANSWER.json"""

from __future__ import annotations

import json
import multiprocessing
import sys
import time
from pathlib import Path
from typing import Any

STARTED = time.time()


def train(task: dict[str, Any]) -> dict[str, Any]:
    """Steps of nnUNetTrainer, in the order of its `run_training`, with what `nnUNetv2_train` sets before it."""
    import torch
    from nnunetv2.run.run_training import get_trainer_from_args

    if task["device"] == "cpu":
        torch.set_num_threads(task["threads"] or multiprocessing.cpu_count())
    else:
        torch.set_num_threads(1)
    trainer = get_trainer_from_args(
        task["dataset"], task["configuration"], 0, "nnUNetTrainer", task["plans"], device=torch.device(task["device"])
    )
    trainer.on_train_start()
    trainer.on_epoch_start()
    trainer.on_train_epoch_start()
    ends = []
    for _ in range(task["warm_up"] + task["steps"]):
        batch = next(trainer.dataloader_train)
        trainer.train_step(batch)
        ends.append(time.time())
    for loader in (trainer.dataloader_train, trainer.dataloader_val):
        if hasattr(loader, "_finish"):
            loader._finish()
    return {
        "started": STARTED,
        "ends": ends,
        "patch_size": [int(n) for n in trainer.configuration_manager.patch_size],
        "input_shape": list(batch["data"].shape),
        "parameters": sum(parameter.numel() for parameter in trainer.network.parameters()),
        "n_outputs": int(trainer.label_manager.num_segmentation_heads),
        "threads": torch.get_num_threads(),
    }


def export(task: dict[str, Any]) -> dict[str, Any]:
    """`export_prediction_from_logits` with the whole logits in memory."""
    import nibabel
    import numpy as np
    from nnunetv2.inference.export_prediction import export_prediction_from_logits
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

    model = Path(task["model"])
    plans = PlansManager(str(model / "plans.json"))
    image = nibabel.load(task["image"])
    shape = image.shape[::-1]
    properties = {
        "nibabel_stuff": {"original_affine": image.affine, "reoriented_affine": image.affine},
        "spacing": [float(mm) for mm in image.header.get_zooms()[::-1]],
        "shape_before_cropping": shape,
        "bbox_used_for_cropping": [[0, n] for n in shape],
        "shape_after_cropping_and_before_resampling": shape,
    }
    threads = {} if task["n_threads"] is None else {"num_threads_torch": task["n_threads"]}
    export_prediction_from_logits(
        np.load(task["logits"]),
        properties,
        plans.get_configuration(task["configuration"]),
        plans,
        json.loads((model / "dataset.json").read_text()),
        task["output"],
        **threads,
    )
    return {}


def predict_in_float32(task: dict[str, Any]) -> dict[str, Any]:
    """nnU-Net's predictor with float32 in place of the half precision in which it sums logits."""
    import torch
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

    torch.half = torch.float32  # nnU-Net's name for the type of its sums
    predictor = nnUNetPredictor(
        use_mirroring=task["mirroring"],
        device=torch.device(task["device"]),
        perform_everything_on_device=False,
        allow_tqdm=False,
    )
    predictor.initialize_from_trained_model_folder(task["model"], [task["fold"]], "checkpoint_final.pth")
    Path(task["output"]).mkdir()
    predictor.predict_from_files_sequential(task["images"], task["output"])
    return {}


JOBS = {"train": train, "export": export, "predict_in_float32": predict_in_float32}

if __name__ == "__main__":
    answer = JOBS[sys.argv[1]](json.loads(Path(sys.argv[2]).read_text()))
    Path(sys.argv[3]).write_text(json.dumps(answer))
