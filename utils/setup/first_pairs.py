"""The pairs that distillation starts from: real ones, those of a set, or noise."""

from collections.abc import Sequence

import torch
from torch import Tensor

from data.errors import InputError
from data.pairs import PairDataset, load_images
from data.transforms import normalize
from utils.forms import PairFeatures, PictureForm, Pyramid, as_words, pair_features, read_words
from utils.matching import FIT
from utils.scoring import embed_images, kmeans, random_rows
from utils.sets import (
    Pairs,
    SynSet,
    initial_similarity,
    load_synset,
    with_text_encoder,
)
from utils.setup.backbones import Backbone

UNIT = (0.0,) * 3, (1.0,) * 3  # mean and std of pixels that several encoders share


def encoder_features(args, kind: str, real: PairDataset, real_embed, encoder, device) -> PairFeatures:
    """Features [rows, D] of the real pairs, see `pair_features`; pictures are encoded only if they are needed."""
    image_embed = None
    if kind != "text":
        image_embed = embed_images(
            real.paths,
            encoder,
            image_size=args.image_size,
            batch_size=args.batch_size_test,
            device=device,
            cache_dir=args.cache_dir,
        )
    return pair_features(kind, image_embed, real_embed, real.row_to_image)


def first_pairs(
    args, real: PairDataset, real_embed: Tensor, backbones: Sequence[Backbone]
) -> tuple[Pairs, PictureForm]:
    """Pairs of --init_set, or real pairs of distinct pictures: one random caption each, or the prototypes of k-means.

    Noise in the place of either modality has the mean and spread of the real ones. Where pictures are not learned as
    pixels, `image_syn` is the identity, weights over the pictures of the form.
    """
    factory = backbones[0].factory
    encoder, device = factory.encoder, factory.device
    mean, std = (encoder.mean, encoder.std) if len(backbones) == 1 else UNIT
    generator, others = torch.Generator().manual_seed(args.seed), []
    if args.init_set:
        first = fitting_set(args, (mean, std), real_embed.shape[1])
        image_syn, text_syn = first.image_syn.float(), first.text_syn.float()
    else:
        if args.pix_init == "kmeans":
            features = encoder_features(args, "joint", real, real_embed, encoder, device)
            rows = kmeans(features, real.row_to_image, args.num_queries, generator)[0]
        else:
            rows = random_rows(real.row_to_image, args.num_queries, generator)
        text_syn = real_embed[rows]
        if args.pix_init != "noise":
            images = load_images([real.paths[i] for i in real.row_to_image[rows]], args.image_size)
            image_syn = normalize(images, mean, std)
            if args.pix_param == "mixture":
                others = other_pictures(real, rows, args.pix_words - len(rows), generator)
    if args.pix_init == "noise":
        image_syn = torch.randn(args.num_queries, 3, args.image_size, args.image_size, generator=generator)
    if args.txt_init == "noise":
        text_syn = torch.randn(text_syn.shape, generator=generator) * real_embed.std() + real_embed.mean()
    similarity = initial_similarity(args.sim_type, args.num_queries, args.sim_rank, generator)
    pictures = words = None
    if args.pix_param == "mixture":
        images = torch.cat([images, load_images(others, args.image_size)]) if others else images
        words = as_words(images, args.pix_quality)
        pictures = normalize(read_words(words), mean, std)
    elif args.text_only and not args.image_trainable:
        pictures = image_syn  # they stay, and go through each encoder once for the whole run
    image_syn = image_syn.to(device, memory_format=torch.channels_last)
    form = PictureForm(
        mean,
        std,
        pictures=pictures,
        words=words,
        pyramid=Pyramid(args.image_size) if args.pix_param == "pyramid" else None,
        limit=args.pix_limit,
        start=None if args.pix_limit is None else image_syn.clone(),  # pixels that are learned move in place
    )
    image_syn = form.hold(image_syn) if pictures is None else torch.eye(args.num_queries, len(pictures), device=device)
    pairs = Pairs(
        image_syn=image_syn,
        text_syn=text_syn.to(device),
        syn_lr_img=first_rate(args.lr_teacher_img, len(backbones)).to(device),
        syn_lr_txt=first_rate(args.lr_teacher_txt, len(backbones)).to(device),
        similarity=tuple(part.to(device) for part in similarity),
    )
    return pairs, form


def other_pictures(real: PairDataset, rows: Tensor, number: int, generator: torch.Generator) -> list:
    """Files of `number` random pictures that are not those of `rows`.

    Raises:
        InputError: the train split has fewer.
    """
    free = torch.ones(len(real.paths), dtype=torch.bool)
    free[real.row_to_image[rows]] = False
    numbers = free.nonzero().flatten()
    if number > len(numbers):
        raise InputError(
            f"--pix_words {number + len(rows)} is more than the {len(real.paths)} pictures of train; lower it"
        )
    return [real.paths[i] for i in numbers[torch.randperm(len(numbers), generator=generator)[:number]]]


def first_rate(given: float | str, backbones: int) -> Tensor:
    """A scalar, or one for each of several encoders; 1 stands for one that is fitted when the experts are known."""
    rate = torch.tensor(1.0 if given == FIT else given)
    return rate if backbones == 1 else rate.repeat(backbones)


def fitting_set(args, space: tuple, text_dim: int) -> SynSet:
    """The set of --init_set. Raises InputError if its pairs are not such as this run learns."""
    synset = load_synset(args.init_set)
    if synset.mixture:
        raise InputError(f"--init_set {args.init_set} holds mixtures, and this run learns pixels; give another set")
    if synset.is_captioned:
        raise InputError(f"--init_set {args.init_set} is pictures with captions, without embeddings; give a set")
    height, width = synset.image_syn.shape[2:]
    parts = [
        ("number of pairs", len(synset.image_syn), args.num_queries),
        ("picture size", f"{height} x {width}", f"{args.image_size} x {args.image_size}"),
        ("text width", synset.text_syn.shape[1], text_dim),
        ("mean and std", (synset.mean, synset.std), tuple(map(tuple, space))),
    ]
    made = with_text_encoder(synset.settings, args.text_encoder)
    parts += [(key, made[key], getattr(args, key)) for key in ("text_encoder", "text_pooling") if key in made]
    for name, found, wanted in parts:
        if found != wanted:
            raise InputError(
                f"--init_set {args.init_set} does not fit: its {name} is {found}, that of this run {wanted}; "
                "change the run or give another set"
            )
    return synset
