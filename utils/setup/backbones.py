"""The image encoders that a run learns through: experts, student and judge of each."""

import argparse
from dataclasses import dataclass

import torch

from data.errors import InputError
from networks.clip_model import CLIPModel, ModelFactory, trained_parameters
from networks.loss import PairLoss
from utils.experts import Shortcut, check_epochs, check_loss, find_trajectories
from utils.matching import Draws
from utils.scoring import embedded_once, mean_and_std
from utils.setup.data import Data
from utils.setup.networks import describe_training, make_factory


@dataclass
class Backbone:
    """One image encoder of a run.

    Attributes:
        name: of the encoder.
        factory, judge: fresh models that are matched with experts, and those that score sets.
        model: of the student.
        training: what trains in it, see `describe_training`.
        experts: their trajectories.
        draws: what each iteration matches.
        scored: by split, what recall is measured on, see `embedded_once`.
    """

    name: str
    factory: ModelFactory
    judge: ModelFactory
    model: CLIPModel
    training: dict
    experts: list
    draws: Draws
    scored: dict[str, tuple]

    @property
    def start(self) -> dict[str, torch.Tensor]:
        """The student's parameters by name."""
        return trained_parameters(self.model)

    @property
    def expert_recall(self) -> float | None:
        """Mean recall of the experts on validation after their last epoch; None if they do not say."""
        last = [expert.recalls[-1]["r_mean"] for expert in self.experts if expert.recalls]
        return sum(last) / len(last) if last else None


def encoder_names(settings: dict) -> list[str]:
    """The image encoders of a command line."""
    names = settings["image_encoder"]
    return [names] if isinstance(names, str) else list(names)


def settings_of_encoder(settings: dict, name: str) -> dict:
    """The settings of a command line as if `name` were its only image encoder.

    Raises:
        InputError: there are as many checkpoints as encoders, or none, and every NAME: of --image_kwargs is an encoder.
    """
    names, checkpoints = encoder_names(settings), settings["image_checkpoint"]
    if isinstance(checkpoints, str):
        checkpoints = [checkpoints]
    if checkpoints and len(checkpoints) != len(names):
        raise InputError(
            f"--image_checkpoint has {len(checkpoints)} values for {len(names)} image encoders; "
            "give one for each, 'none' for published weights"
        )
    checkpoint = checkpoints[names.index(name)] if checkpoints else None
    kwargs = {}
    for key, value in settings["image_kwargs"].items():
        owner, _, key = key.rpartition(":")
        if owner and owner not in names:
            raise InputError(f"--image_kwargs {owner}:{key} is of none of the image encoders {', '.join(names)}")
        if owner in ("", name):
            kwargs[key] = value
    own = {"image_encoder": name, "image_checkpoint": None if checkpoint == "none" else checkpoint}
    return {**settings, **own, "image_kwargs": kwargs}


def args_of_encoders(args) -> list[argparse.Namespace]:
    """The command line for each image encoder alone."""
    return [argparse.Namespace(**settings_of_encoder(vars(args), name)) for name in encoder_names(vars(args))]


def open_backbones(args, data: Data) -> list[Backbone]:
    """The image encoders of distill.py; the first one's factory is that of `data`.

    Raises InputError if one has no experts, or such that this run cannot match.
    """
    backbones = []
    for own in args_of_encoders(args):
        factory = data.factory if not backbones else make_factory(own, data.factory.text_dim)
        backbones.append(_open_backbone(own, data, factory))
    return backbones


def _open_backbone(args, data: Data, factory: ModelFactory) -> Backbone:
    # A model to match the experts with; what trains in it must be what they hold.
    model = factory.fresh(args.seed, PairLoss(args.loss_type, args.student_temperature))
    training = describe_training(args.image_encoder, factory, model)
    settings = {**vars(args), **training}
    experts = find_trajectories(args.buffer_path, settings, trained_parameters(model), args.max_files, args.max_experts)
    check_epochs(experts, args.max_start_epoch, args.expert_epochs, args.phases, args.shortcut)
    check_loss(experts, args.loss_type)
    judge = make_factory(args, factory.text_dim, train_in_full=True) if args.eval_full else factory
    return Backbone(
        name=args.image_encoder,
        factory=factory,
        judge=judge,
        model=model,
        training=training,
        experts=experts,
        draws=make_draws(args, experts),
        # A frozen encoder sees the scored pictures once for all evaluations.
        scored={
            split: embedded_once(pairs, judge, args.batch_size_test, args.cache_dir)
            for split, pairs in data.scored.items()
        },
    )


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


def draw_encoders(args, number: int, iteration: int) -> list[int]:
    """Which of the `number` encoders take part in an iteration: all, or --encoders_per_step drawn ones."""
    generator = torch.Generator().manual_seed(args.seed * 1_000_003 + iteration)
    return torch.randperm(number, generator=generator)[: args.encoders_per_step].sort().values.tolist()


def mean_share(backbones: list[Backbone], by_encoder: list) -> float:
    """How good a set is by its recalls on validation: their mean, over several encoders that of the experts' shares."""
    recalls = [mean_and_std(results)[0]["r_mean"] for results in by_encoder]
    experts = [backbone.expert_recall for backbone in backbones]
    if len(backbones) > 1 and None not in experts:
        recalls = [recall / expert for recall, expert in zip(recalls, experts, strict=True)]
    return sum(recalls) / len(recalls)
