"""Recipes: whole sets of defaults by name; every flag is still free. And the settings of `--dataset demo`."""

from pathlib import Path

FIT = "fit"  # in the place of a first student rate, see `utils.matching.fit_first_rates`
RELEASED_STUDENT = 0.376  # 1 / ln(1 / 0.07): the released student's scale is not exponentiated

FITTED = {"lr_teacher_img": FIT, "lr_teacher_txt": FIT}
HEADS = {"image_trainable": False, "only_has_image_projection": True}
# Of LoRS for 100 pairs of Flickr30K (Xu et al., ICML 2024); 99 pairs, as the similarity takes the place of one.
LORS = {
    **{"num_queries": 99, "mini_batch_size": 20, "batch_order": "permutation", "student_temperature": 0.07},
    **{"loss_type": "WBCE", "sim_type": "lowrank", "sim_rank": 10, "alpha": 3.0},
    **{"lr_img": 100.0, "lr_txt": 100.0, "lr_sim": 10.0, "epoch_eval_train": 100, "batch_train": 128},
}

# A recipe's settings, for each script that has the flag; those under a script's name are for it alone.
RECIPES = {
    "wu2024": {},  # the paper's settings are the flags' own defaults
    "adam": {"optimizer": "adam", "student_temperature": 0.07, "mini_batch_size": 25, "distill.py": FITTED},
    "heads": {
        **LORS,
        **HEADS,
        **{"segments": 4, "lr_img": 300.0, "lr_txt": 300.0, "ema_decay": 0.9},
        "distill.py": FITTED,
    },
    "lors": LORS,
    "repblend": {**LORS, **HEADS, "blend_alpha": 1.0},
    "ptmst": {
        **LORS,
        **HEADS,
        **{"sim_type": "full", "lr_img": 1000.0, "lr_txt": 1000.0, "ema_decay": 0.99, "shortcut": 5},
    },
    "demo": {
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
        "student_temperature": 0.07,
        "num_eval": 3,
        "grid_img": [0.01, 0.03],
        "grid_txt": [0.03, 0.1],
        # The student takes 8 steps on 25 pairs where an expert took 118 on 128: at its rate it would go astray.
        "distill.py": {"lr_teacher_txt": 0.03},
    },
}

# What `--dataset demo` changes: data and encoders that need no download; its recipe is "demo" if none is given.
DEMO_DATA = {
    "image_root": "demo_data",
    "ann_root": "demo_data",
    "image_encoder": "test_nfnet",
    "image_checkpoint": str(Path(__file__).parents[1] / "networks/demo_nfnet.safetensors"),
    "text_encoder": "demo",
    "text_pooling": "mean",
    "image_size": 48,
    "num_workers": 0,
}

# What --lr_img, --lr_txt, --lr_lr and --lr_sim are if not given.
OUTER_RATES = {
    "sgd": {"lr_img": 1000.0, "lr_txt": 1000.0, "lr_lr": 1e-2, "lr_sim": 10.0},
    "adam": {"lr_img": 0.03, "lr_txt": 0.03, "lr_lr": 0.02, "lr_sim": 0.03},
}


def recipe_defaults(script: str, dataset: str, recipe: str | None) -> dict:
    """The defaults of `script` ("buffer.py" …) for a data set and a recipe; None stands for the data set's own."""
    is_demo = dataset == "demo"
    recipe = recipe or ("demo" if is_demo else "wu2024")
    settings = {key: value for key, value in RECIPES[recipe].items() if not key.endswith(".py")}
    return (DEMO_DATA if is_demo else {}) | settings | RECIPES[recipe].get(script, {}) | {"recipe": recipe}
