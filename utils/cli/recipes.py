"""Recipes: whole sets of defaults by name; every flag is still free. And the settings of `--dataset demo`."""

from pathlib import Path

from utils.matching import FIT

RELEASED_STUDENT = 0.376  # 1 / ln(1 / 0.07): the released student's scale is not exponentiated

# Of LoRS for 100 pairs of Flickr30K (Xu et al., ICML 2024); 99 pairs, as the similarity takes the place of one.
LORS = {
    **{"num_queries": 99, "mini_batch_size": 20, "batch_order": "permutation", "student_temperature": 0.07},
    **{"loss_type": "WBCE", "sim_type": "lowrank", "sim_rank": 10, "alpha": 3.0},
    **{"lr_img": 100.0, "lr_txt": 100.0, "lr_sim": 10.0, "epoch_eval_train": 100, "batch_train": 128},
}
HEADS = {"image_trainable": False, "only_has_image_projection": True}
FITTED = {"lr_teacher_img": FIT, "lr_teacher_txt": FIT}
# Learned texts and mixtures of real pictures (docs/notebook/transfer.md).
PORTABLE = {
    **{**HEADS, "pix_param": "mixture", "pix_words": 1000, "pix_init": "kmeans", "segments": 2},
    # From the experts' start alone, as networks that train on the set; rates that Adam raises soon.
    **{"max_start_epoch": 1, "lr_teacher_img": 0.03, "lr_teacher_txt": 0.03},
    **{"optimizer": "adam", "lr_img": 0.005, "lr_txt": 0.1, "lr_lr": 0.05, "student_momentum": 0.9},
    **{"mini_batch_size": 20, "batch_order": "permutation", "student_temperature": 0.07, "ema_decay": 0.9},
    # Networks that train on the set at 0.14 reach more than at 0.07, experts less.
    **{"Iteration": 150, "epoch_eval_train": 100, "batch_train": 128, "temperature": 0.14},
}
TEACHERS_OF_DEMO = {"lr_teacher_img": 0.03, "lr_teacher_txt": 0.1}


def _of_lors(help: str, what_trains: dict, **of_distillation) -> dict:
    """LoRS's settings with others of distill.py; coresets of as many pairs."""
    return {
        "help": help,
        "buffer.py": what_trains,
        "coreset.py": {"num_queries": LORS["num_queries"], **what_trains},
        "distill.py": {**LORS, **what_trains, **of_distillation},
    }


# A recipe's words in --help, and its settings for each script; a key that is no flag of the script is an error.
RECIPES = {
    "wu2024": {"help": "the paper's"},  # its settings are the flags' own defaults
    "lors": _of_lors("of LoRS, whose soft targets are a learned similarity of low rank", {}),
    "repblend": _of_lors("of RepBlend, heads over frozen encoders, whose outputs are blended", HEADS, blend_alpha=1.0),
    "ptmst": _of_lors(
        "of PTM-ST, heads that match straightened trajectories",
        HEADS,
        **{"sim_type": "full", "lr_img": 1000.0, "lr_txt": 1000.0, "ema_decay": 0.99, "shortcut": 5},
    ),
    "adam": {
        "help": "Adam in the outer loop and fitted first rates",
        "distill.py": {"optimizer": "adam", "student_temperature": 0.07, "mini_batch_size": 25, **FITTED},
    },
    "heads": _of_lors(
        "frozen encoders with a projection on each side and fitted first rates",
        HEADS,
        **{"segments": 4, "lr_img": 300.0, "lr_txt": 300.0, "ema_decay": 0.9, **FITTED},
    ),
    "portable": {
        "help": "texts and mixtures of 1,000 real pictures, for encoders that take no part too",
        "buffer.py": HEADS,
        "coreset.py": HEADS,
        "distill.py": PORTABLE,
    },
    "demo": {
        "help": "portable for the drawn scenes, the default of --dataset demo",
        "buffer.py": {**HEADS, **TEACHERS_OF_DEMO, "mom": 0.9, "num_experts": 6, "train_epochs": 3},
        "coreset.py": {**HEADS, **TEACHERS_OF_DEMO, "train_epochs": 3},
        # Experts learn slower here than over encoders that saw photographs: more steps, to a later epoch.
        "distill.py": {
            **{**PORTABLE, **TEACHERS_OF_DEMO, "expert_epochs": 3, "syn_steps": 16, "segments": 1, "lr_lr": 0.1},
            **{"mini_batch_size": 50, "student_temperature": 0.14, "ema_decay": 0.97, "Iteration": 250},
            **{"eval_it": 125, "num_eval": 3},
        },
        "evaluate.py": {"num_eval": 3, "grid_img": [0.03], "grid_txt": [0.03]},  # beside the own rates of each set
    },
    "demo_whole": {
        "help": "short runs of whole networks on the drawn scenes",
        # A flipped picture would make "left of" wrong.
        "buffer.py": {"no_aug": True, "num_experts": 2, "train_epochs": 3, **TEACHERS_OF_DEMO},
        "coreset.py": {"no_aug": True, "num_queries": 50, "train_epochs": 3, **TEACHERS_OF_DEMO},
        "distill.py": {
            **{"no_aug": True, "num_queries": 50, "mini_batch_size": 25, "Iteration": 60, "eval_it": 20},
            **{"lr_img": 100.0, "lr_txt": 5.0, "lr_lr": 5e-4, "student_temperature": 0.07, "num_eval": 3},
            # The student takes 8 steps on 25 pairs where an expert took 118 on 128: at its rate it would go astray.
            **{"lr_teacher_img": 0.03, "lr_teacher_txt": 0.03},
        },
        "evaluate.py": {"num_eval": 3, "grid_img": [0.01, 0.03], "grid_txt": [0.03, 0.1]},
    },
}

# What `--dataset demo` changes: data and encoders that need no download; its recipe is "demo" if none is given.
DEMO_DATA = {
    "image_root": "demo_data",
    "ann_root": "demo_data",
    "image_encoder": "test_nfnet",
    "image_checkpoint": str(Path(__file__).parents[2] / "networks/demo_nfnet.safetensors"),
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
    return (DEMO_DATA if is_demo else {}) | RECIPES[recipe].get(script, {}) | {"recipe": recipe}
