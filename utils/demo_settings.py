"""Settings of `--dataset demo`."""

from pathlib import Path

# What `--dataset demo` changes: encoders that need no download, and settings found to work on it.
DEMO_DEFAULTS = {
    "image_root": "demo_data",
    "ann_root": "demo_data",
    "image_encoder": "test_nfnet",
    "image_checkpoint": str(Path(__file__).parents[1] / "networks/demo_nfnet.safetensors"),
    "text_encoder": "demo",
    "text_pooling": "mean",
    "image_size": 48,
    "num_workers": 0,
    "no_aug": True,  # a flipped picture would make "left of" wrong
    "num_experts": 2,
    "train_epochs": 3,
    "lr_teacher_img": 0.03,
    "lr_teacher_txt": 0.1,
    "num_queries": 50,
    "mini_batch_size": 25,
    "Iteration": 60,
    "eval_it": 20,
    "lr_img": 100.0,
    "lr_txt": 5.0,
    "lr_lr": 5e-4,
    "num_eval": 3,
    "grid_img": [0.01, 0.03],
    "grid_txt": [0.03, 0.1],
}
# The student takes 8 steps on 25 pairs where an expert took 118 on 128: at an expert's rate it would go astray.
DEMO_DISTILL = {"lr_teacher_txt": 0.03}
