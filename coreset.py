"""Chooses real pairs and saves them as a set like distill.py's: the baselines of distillation.

Every method takes a picture at most once. random: a random caption of random pictures. herding: the pairs whose mean
feature is nearest to that of all pairs, one after another. kcenter: always the pair farthest from those chosen.
kmeans: the pairs nearest to the centres of as many clusters. forgetting: the pairs that an expert forgets most often
while it trains, or never learns.
"""

import functools
import sys
from pathlib import Path

import torch

from data.errors import InputError
from data.pairs import load_images
from data.transforms import normalize
from networks.loss import PairLoss
from utils import cli, ranks
from utils.device import describe_device
from utils.scoring import (
    ForgettingCounter,
    check_num_queries,
    device_batches,
    herding,
    highest,
    kcenter,
    kmeans,
    random_rows,
    train_epochs,
)
from utils.sets import SynSet, picture_grid, save_synset
from utils.setup import (
    check_encoder_features,
    encoder_features,
    expert_loader,
    expert_recipe,
    find_device,
    find_split,
    make_factory,
    make_text_encoder,
    training_pairs,
)

METHODS = ("random", "herding", "kcenter", "kmeans", "forgetting")


def parse_args(argv=None):
    parser = cli.Parser(prog="coreset.py", description=__doc__)
    cli.add_recipe_flag(parser)
    cli.add_data_flags(parser)
    cli.add_network_flags(parser)
    cli.add_run_flags(parser)
    pairs = parser.section("pairs").add_argument
    pairs("--method", choices=METHODS, required=True, help="how pairs are chosen")
    pairs("--num_queries", type=cli.count, default=100, help="number of pairs")
    pairs(
        "--features",
        choices=("image", "text", "joint"),
        default="joint",
        help="what herding, kcenter and kmeans compare: the pretrained encoders' L2-normalised features, joint is both",
    )
    cli.add_expert_flags(parser, for_set=True)
    output = parser.section("output")
    add = output.add_argument
    add("--save_dir", default="./runs/coreset", help="folder of the set, METHOD_NUMBER.safetensors, and its pictures")
    add("--output", help="the set's file instead of one in --save_dir; it ends in .safetensors")
    output.add_bool("draw", True, "save a picture grid with captions beside the set")
    parser.set_defaults(cache_images=False, aug_views=0)
    return parser.parse(argv)


@cli.one_line_errors
def main(argv=None):
    args = parse_args(argv)
    check_flags(args)
    output = Path(args.output or f"{args.save_dir}/{args.method}_{args.num_queries}.safetensors")
    device = find_device(args)
    print(describe_device(device))

    # The real pairs and the encoders.
    with ranks.first_goes_first():
        records, paths = find_split(args, "train")
        check_num_queries(args.num_queries, len(paths))
        text_encoder = make_text_encoder(args)
        factory = make_factory(args, text_encoder.width)
        real, real_embed = training_pairs(args, (records, paths), text_encoder)
    del text_encoder

    # Features of pictures are all ranks' work, the rest is that of the first.
    if args.method == "forgetting":
        loader = expert_loader(args, real, factory)[0](args.seed)
    elif args.method != "random":
        features = encoder_features(args, args.features, real, real_embed, factory.encoder, device)
    if not ranks.is_first():
        return

    # The choice.
    generator = torch.Generator().manual_seed(args.seed)
    if args.method == "random":
        rows = random_rows(real.row_to_image, args.num_queries, generator)
        scores = [0.0] * len(rows)
    elif args.method == "forgetting":
        forgotten = count_forgetting(loader, real, real_embed, factory, args, device)
        rows, scores = highest(forgotten, real.row_to_image, args.num_queries, generator)
    else:
        by_name = {"herding": herding, "kcenter": kcenter, "kmeans": functools.partial(kmeans, generator=generator)}
        choose = by_name[args.method]
        rows, scores = choose(features, real.row_to_image, args.num_queries)

    # The set.
    synset = as_set(rows, scores, real, real_embed, records, factory.encoder, args)
    save_synset(output, synset)
    print(f"{args.method}: {len(rows)} of {len(real)} pairs of {len(paths)} pictures, saved to {output}")
    if args.draw:
        picture_grid(synset).save(output.with_suffix(".png"))


def check_flags(args) -> None:
    """Raises InputError for flags with which the method cannot work."""
    if args.output and not args.output.endswith(".safetensors"):
        raise InputError(f"--output {args.output} must end in .safetensors")
    if args.method == "forgetting" and args.train_epochs < 2:
        raise InputError("--method forgetting needs --train_epochs of 2 or more: nothing seen once can be forgotten")
    if args.method == "forgetting" and args.batch_size_train < 2:
        raise InputError("--method forgetting needs --batch_size_train of 2 or more: a pair alone is always matched")
    if args.method in ("herding", "kcenter", "kmeans") and args.features != "text":
        check_encoder_features(args, f"--features {args.features}", " or use --features text")


def count_forgetting(loader, real, real_embed, factory, args, device):
    """Trains one expert as buffer.py does; returns each pair's forgetting events [rows]."""
    torch.manual_seed(args.seed)
    model = factory.fresh(args.seed, PairLoss(temperature=args.temperature))
    counter = ForgettingCounter(real.row_to_image)

    def batches(epoch):
        return device_batches(counter.watch(loader), real_embed, model.image_encoder, device)

    recipe = expert_recipe(args)
    for epoch, (loss, _) in train_epochs(model, batches, **recipe, on_batch=counter.count_batch):
        shares = [100 * flags.float().mean().item() for flags in (counter.was_matched, counter.learned)]
        print(
            f"epoch {epoch}/{args.train_epochs}: loss {loss:.3f}, {shares[0]:.1f} % of the pairs matched, "
            f"{shares[1]:.1f} % at least once, {counter.forgotten.sum()} forgetting events"
        )
    return counter.scores()


def as_set(rows, scores, real, real_embed, records, encoder, args) -> SynSet:
    """The chosen pairs with their captions, file names and scores; the rates are those of the flags."""
    pictures = real.row_to_image[rows].tolist()
    images = load_images([real.paths[i] for i in pictures], args.image_size)
    return SynSet(
        image_syn=normalize(images, encoder.mean, encoder.std),
        text_syn=real_embed[rows],
        syn_lr_img=args.lr_teacher_img,
        syn_lr_txt=args.lr_teacher_txt,
        captions=[real.captions[row] for row in rows],
        mean=encoder.mean,
        std=encoder.std,
        settings=vars(args),
        files=[records[i].image for i in pictures],
        scores=scores,
    )


if __name__ == "__main__":
    sys.exit(main())
