"""The student of each encoder, and the learner that moves the pairs."""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from utils.matching import PairLearner
from utils.scoring import embed_batches
from utils.sets import Pairs, PictureForm, mix
from utils.setup.backbones import Backbone
from utils.setup.first_pairs import UNIT
from utils.student import StudentLoss


def make_student_loss(args, backbone: Backbone, form: PictureForm) -> StudentLoss:
    """The loss whose gradient the student of the encoder steps with."""
    embed = _embedding(backbone, form, args.batch_size_test)
    return StudentLoss(backbone.model, alpha=args.alpha, blend_alpha=args.blend_alpha, embed=embed)


def _embedding(backbone: Backbone, form: PictureForm, batch_size: int) -> Callable[[Tensor], Tensor] | None:
    """From pictures as they are learned to the frozen encoder's output; None for the encoder's own pixels."""
    encoder = backbone.factory.encoder
    if form.pictures is not None:
        # What pictures are mixed from goes through the encoder once for the whole run.
        pictures = renormalize(form.pictures.to(backbone.factory.device), form, encoder)
        features = embed_batches(backbone.model, pictures.contiguous(memory_format=torch.channels_last), batch_size)
        return (lambda weights: mix(weights, features)) if form.words else (lambda weights: weights @ features)
    if (tuple(form.mean), tuple(form.std)) == UNIT:
        return lambda pixels: backbone.model.embed_images(renormalize(pixels, form, encoder))
    return None


def renormalize(pixels: Tensor, old, new) -> Tensor:
    """[..., 3, H, W], from the normalisation (mean, std) of `old` to that of `new`."""
    old_mean, old_std, mean, std = (
        torch.tensor(v, device=pixels.device).view(3, 1, 1) for v in (old.mean, old.std, new.mean, new.std)
    )
    return (pixels * old_std + old_mean - mean) / std


def pairs_of_encoder(pairs: Pairs, number: int) -> Pairs:
    """The pairs with the rates of one encoder alone, scalars."""
    if pairs.syn_lr_img.ndim == 0:
        return pairs
    return replace(pairs, syn_lr_img=pairs.syn_lr_img[number], syn_lr_txt=pairs.syn_lr_txt[number])


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
