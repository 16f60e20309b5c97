"""The student of each encoder, and the learner that moves the pairs."""

import functools
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from utils.forms import PictureForm, mix, one_of_each, view_normalised, with_views
from utils.matching import FIT, Fitting, PairLearner, Room, fit_first_rates, fit_room
from utils.scoring import embed_batches
from utils.sets import Pairs
from utils.setup.backbones import Backbone
from utils.setup.first_pairs import UNIT
from utils.student import Segment, StudentLoss, check_shares


class Student:
    """The student over one encoder, with as many pairs at a time as fit into memory.

    Args:
        pairs: the first ones, with the rates of this encoder.
    """

    def __init__(self, args, backbone: Backbone, pairs: Pairs, form: PictureForm):
        self.args, self.name, self.draws = args, backbone.name, backbone.draws
        self.real = None if form.pictures is None else RealPictures(backbone, form, args)
        embed = self.real or _embedding(backbone, form)
        self.loss_fn = StudentLoss(backbone.model, alpha=args.alpha, blend_alpha=args.blend_alpha, embed=embed)
        # How it steps, and how its gradient goes back, is the same in a trial of the memory and in the run.
        self.steps = {"momentum": args.student_momentum, "adjoint_decay": args.adjoint_decay}
        problem = self.loss_fn, backbone.start, pairs, self.draws.batch_size
        room = Room(args.pair_chunk) if args.pair_chunk else fit_room(*problem, args.syn_steps, **self.steps)
        check_shares(*problem, room.pair_chunk)
        # Later the card may have less room than in the trial; a chunk that the user gave is not changed.
        self.fitting = Fitting(room, may_shrink=not args.pair_chunk)

    def run(self, function: Callable, segments: Sequence[Segment], **problem):
        """`function` of the student's loss and `segments`, such as `mean_matching`."""
        if self.real:
            self.real.draw(segments[0].seed)
        call = functools.partial(function, self.loss_fn, segments, **problem, **self.steps)
        return self.fitting.call(call, batch_size=len(segments[0].batches[0]))

    def fit_first_rates(self, pairs: Pairs) -> None:
        """Chooses the first rates of `pairs` that are to fit, if any, in place, on the segments of iteration 0."""
        given = {"syn_lr_img": self.args.lr_teacher_img, "syn_lr_txt": self.args.lr_teacher_txt}
        names = [name for name, rate in given.items() if rate == FIT]
        if not names:
            return
        segments = self.draws.read(0, pairs.image_syn.device)
        for name, rate in self.run(fit_first_rates, segments, pairs=pairs, names=names).items():
            getattr(pairs, name).fill_(rate)
        print(f"{self.name}: first student rates, fitted: {pairs.syn_lr_img:.3g} {pairs.syn_lr_txt:.3g}")


class RealPictures:
    """What learned weights are over: a frozen encoder's output for the real pictures of `form`.

    The pictures go through the encoder once for the whole run, and so do --syn_views views of them. Called with weights
    [B, N], it gives the encoder's output [B, D_enc] for the pictures that they stand for.
    """

    def __init__(self, backbone: Backbone, form: PictureForm, args):
        encoder = backbone.factory.encoder
        pictures = renormalize(form.pictures.to(backbone.factory.device), form, encoder)
        pictures = pictures.contiguous(memory_format=torch.channels_last)
        shown = with_views(pictures, encoder.mean, encoder.std, args.syn_views, args.seed)
        self.features = [embed_batches(backbone.model, images, args.batch_size_test) for images in shown]
        self.seen = self.features[0]
        self.mix = mix if form.words else torch.matmul

    def draw(self, seed: int) -> None:
        """Decides which view of each picture is seen: the same by all segments of an iteration."""
        if len(self.features) > 1:
            self.seen = one_of_each(self.features, torch.Generator().manual_seed(seed))

    def __call__(self, weights: Tensor) -> Tensor:
        return self.mix(weights, self.seen)


def _embedding(backbone: Backbone, form: PictureForm) -> Callable[[Tensor], Tensor] | None:
    """From pixels as they are learned to the frozen encoder's output; None for the encoder's own pixels."""
    if (tuple(form.mean), tuple(form.std)) == UNIT:
        return lambda pixels: backbone.model.embed_images(renormalize(pixels, form, backbone.factory.encoder))
    return None


def renormalize(pixels: Tensor, old, new) -> Tensor:
    """[..., 3, H, W], from the normalisation (mean, std) of `old` to that of `new`."""
    old_mean, old_std, mean, std = (
        torch.tensor(v, device=pixels.device).view(3, 1, 1) for v in (old.mean, old.std, new.mean, new.std)
    )
    return (pixels * old_std + old_mean - mean) / std


def seen_pictures(args, form: PictureForm, image_syn: Tensor, iteration: int) -> Tensor:
    """The pictures [M, 3, H, W] that students of an iteration see, with a graph back to `image_syn`, which is learned.

    `image_syn` itself where that is what they see.
    """
    pictures = form.render(image_syn)
    if args.syn_aug:
        generator = torch.Generator().manual_seed(args.seed * 1_000_003 + iteration)
        pictures = view_normalised(pictures, form.mean, form.std, args.syn_aug, generator)
    return pictures if pictures is image_syn else pictures.contiguous(memory_format=torch.channels_last)


def pairs_of_encoder(pairs: Pairs, number: int) -> Pairs:
    """The pairs with the rates of one encoder alone, scalars."""
    if pairs.syn_lr_img.ndim == 0:
        return pairs
    return replace(pairs, syn_lr_img=pairs.syn_lr_img[number], syn_lr_txt=pairs.syn_lr_txt[number])


def make_learner(args, pairs: Pairs, form: PictureForm) -> PairLearner:
    """Moves `pairs`, whose pictures are held as `form` says; a modality that is not to be learned keeps its values."""
    return PairLearner(
        pairs,
        lr_img=0.0 if args.text_only else args.lr_img,
        lr_txt=0.0 if args.image_only else args.lr_txt,
        lr_lr=args.lr_lr,
        optimizer=args.optimizer,
        lr_sim=args.lr_sim,
        ema_decay=args.ema_decay,
        spread=form.spread(pairs.image_syn),
    )
