"""Where distill.py writes its run, and what a continued run has in common with the one it continues."""

from pathlib import Path

from data.errors import InputError
from utils.matching import PairLearner

# What may differ between a run and its continuation.
FREE_ON_RESUME = {
    *("Iteration", "resume", "save_dir", "name", "disabled_wandb", "draw", "std", "num_workers", "device", "cache_dir"),
    *("image_root", "ann_root", "buffer_path", "pair_chunk", "recipe", "report", "coreset"),
}
# What runs were made with that lack a setting; their student had the temperature of the experts.
ADDED = {
    **{"optimizer": "sgd", "student_momentum": 0.0, "adjoint_decay": 1.0, "only_has_image_projection": False},
    **{"loss_type": "InfoNCE", "sim_type": "none", "ema_decay": 0.0, "blend_alpha": 0.0},
    **{"batch_order": "independent", "phases": 1, "segments": 1, "shortcut": None, "init_set": None},
    **{"split_seed": 0, "pix_param": "pixels", "encoders_per_step": None},
    **{"syn_aug": [], "pix_limit": None, "eval_views": 0, "txt_param": "embeddings"},
    **{"syn_views": 0, "pix_quality": 90},
}


def check_run_folder(args) -> None:
    """Raises InputError if this would write over a run, or continue one that is not there."""
    folder, exists = Path(args.save_dir), state_file(args).exists()
    if exists and not args.resume:
        raise InputError(f"{folder} already holds a run; add --resume to continue it or give another --save_dir")
    if args.resume and not exists:
        raise InputError(f"{folder} holds no run to resume; check --save_dir")


def state_file(args) -> Path:
    return Path(args.save_dir) / "state.safetensors"


def resume(args, learner: PairLearner) -> None:
    """Brings the learner to where the run in --save_dir was.

    Raises InputError if its state cannot be read, was made with other settings, or is beyond --Iteration already.
    """
    free = FREE_ON_RESUME - {"Iteration"} if args.phases > 1 else FREE_ON_RESUME  # a phase is a part of them
    learner.load(state_file(args), vars(args), free, added={**ADDED, "student_temperature": args.temperature})
    done = learner.iteration
    if done > args.Iteration:
        raise InputError(
            f"{Path(args.save_dir)} has {done} iterations already, --Iteration is {args.Iteration}; give {done} or more"
        )
