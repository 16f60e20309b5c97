"""The student of a run, what it matches, and the learner that moves the pairs."""

from networks.clip_model import CLIPModel
from utils.experts import Shortcut
from utils.matching import Draws, PairLearner
from utils.sets import Pairs
from utils.student import StudentLoss


def make_student_loss(args, model: CLIPModel) -> StudentLoss:
    """The loss whose gradient the student of `model` steps with."""
    return StudentLoss(model, alpha=args.alpha, blend_alpha=args.blend_alpha)


def make_draws(args, experts: list) -> Draws:
    """What each iteration draws: pieces of the experts' trajectories, or of their shortcuts with --shortcut."""
    return Draws(
        experts=[Shortcut(expert, args.shortcut) for expert in experts] if args.shortcut else experts,
        seed=args.seed,
        num_pairs=args.num_queries,
        batch_size=min(args.mini_batch_size or args.num_queries, args.num_queries),
        steps=args.syn_steps,
        max_start_epoch=args.max_start_epoch,
        expert_epochs=args.expert_epochs,
        batch_order=args.batch_order,
        phases=args.phases,
        iterations=args.Iteration,
        segments=args.segments,
    )


def make_learner(args, pairs: Pairs) -> PairLearner:
    """Moves `pairs`; a modality that is not to be learned keeps its values."""
    return PairLearner(
        pairs,
        lr_img=0.0 if args.text_only else args.lr_img,
        lr_txt=0.0 if args.image_only else args.lr_txt,
        lr_lr=args.lr_lr,
        optimizer=args.optimizer,
        lr_sim=args.lr_sim,
        ema_decay=args.ema_decay,
    )
