"""Chooses real pairs and saves them as a set like distill.py's: the baselines of distillation.

Every method takes a picture at most once. random: a random caption of random pictures. herding: the pairs whose mean
feature is nearest to that of all pairs, one after another. kcenter: always the pair farthest from those chosen.
kmeans: the pairs nearest to the centres of as many clusters. prototypes: the pictures of kmeans, each with the mean
text embedding of its cluster. forgetting: the pairs that an expert forgets most often while it trains, or never learns.
"""

import functools
import sys
from pathlib import Path

import torch

from data.pairs import load_images
from data.transforms import normalize
from data.whole import replacing
from networks.loss import PairLoss
from utils import cli, ranks
from utils.cli.checks import check_coreset
from utils.device import describe_device
from utils.scoring import (
    ForgettingCounter,
    device_batches,
    herding,
    highest,
    kcenter,
    kmeans,
    nearest_captions,
    prototypes,
    random_rows,
    train_epochs,
)
from utils.sets import MADE_TEXTS, REAL_PAIRS, SynSet, picture_grid, save_synset
from utils.setup import (
    Data,
    args_of_encoders,
    encoder_features,
    expert_loader,
    expert_training,
    find_device,
    open_data,
    plan_coreset,
)

METHODS = (*REAL_PAIRS, *MADE_TEXTS)


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
        help="what herding, kcenter, kmeans and prototypes compare: the pretrained encoders' L2-normalised features, "
        "joint is both",
    )
    cli.add_expert_flags(parser, for_set=True)
    output = parser.section("output")
    add = output.add_argument
    add("--save_dir", default="./runs/coreset", help="folder of the set, METHOD_NUMBER.safetensors, and its pictures")
    add("--output", help="the set's file instead of one in --save_dir; it ends in .safetensors")
    cli.add_plan_flag(parser)
    output.add_bool("draw", True, "save a picture grid with captions beside the set")
    parser.set_defaults(cache_images=False, aug_views=0)
    return parser.parse(argv)


@cli.one_line_errors
def main(argv=None):
    (args,) = args_of_encoders(parse_args(argv))
    is_plan = vars(args).pop("plan")
    check_coreset(args)
    if is_plan:
        compares = args.method not in ("random", "forgetting")
        plan_coreset(args, functools.partial(choose_by_features, args) if compares else None)
        return
    output = Path(args.output or f"{args.save_dir}/{args.method}_{args.num_queries}.safetensors")
    # All that draws has --seed: the same command chooses the same pairs.
    device = find_device(args)
    print(describe_device(device))

    # The train split alone: a coreset is chosen without a look at what it will be scored on.
    data = open_data(args, num_queries=args.num_queries)
    real = data.real

    # Features of pictures are all ranks' work, the rest is that of the first.
    if args.method == "forgetting":
        loader = expert_loader(args, real, data.factory)[0](args.seed)
    elif args.method != "random":
        features = encoder_features(args, args.features, real, data.real_embed, data.factory.encoder, device)
    if not ranks.is_first():
        return

    # The choice: rows of the split, in the order in which they were chosen, and a score for each.
    texts = None  # the embeddings of the chosen pairs' captions
    if args.method == "random":
        # Of each picture one caption, by chance too; nothing ranks the pairs.
        rows = random_rows(real.row_to_image, args.num_queries, generator_of(args))
        scores = [0.0] * len(rows)
    elif args.method == "forgetting":
        # Pairs that the expert never learned count as forgotten most often; ties are broken by chance.
        forgotten = count_forgetting(loader, data, args, device)
        rows, scores = highest(forgotten, real.row_to_image, args.num_queries, generator_of(args))
    else:
        (rows, scores), texts = choose_by_features(args, features, real.row_to_image, data.real_embed)

    # The set has the form of a distilled one, so that all that reads those reads it.
    synset = as_set(rows, scores, texts, data, args)
    save_synset(output, synset)
    print(f"{args.method}: {len(rows)} of {len(real)} pairs of {len(real.paths)} pictures, saved to {output}")
    if args.draw:  # for people to look at
        with replacing(output.with_suffix(".png")) as path:
            picture_grid(synset).save(path)


def generator_of(args) -> torch.Generator:
    return torch.Generator().manual_seed(args.seed)


def choose_by_features(args, features, groups, text_embed):
    """((rows, scores), text embeddings of prototypes [M, D_text] or None) of a method that compares features."""
    if args.method == "prototypes":
        # The pictures of k-means; a text stands for all captions of its cluster.
        return prototypes(features, groups, args.num_queries, generator_of(args), text_embed)
    # These do not draw but for the first centres of k-means.
    by_name = {
        "herding": herding,
        "kcenter": kcenter,
        "kmeans": functools.partial(kmeans, generator=generator_of(args)),
    }
    return by_name[args.method](features, groups, args.num_queries), None


def count_forgetting(loader, data: Data, args, device):
    """Trains one expert as buffer.py does; returns each pair's forgetting events [rows]."""
    # With the seed of buffer.py's first expert.
    torch.manual_seed(args.seed)
    model = data.factory.fresh(args.seed, PairLoss(temperature=args.temperature))
    counter = ForgettingCounter(data.real.row_to_image)

    def batches(epoch):
        # The counter notes which rows a batch holds, then, from its features, which of them are matched.
        return device_batches(counter.watch(loader), data.real_embed, model.image_encoder, device)

    for epoch, (loss, _) in train_epochs(model, batches, **expert_training(args), on_batch=counter.count_batch):
        # In per cent of the pairs: too few that were learned once make the count say little.
        shares = [100 * flags.float().mean().item() for flags in (counter.was_matched, counter.learned)]
        print(
            f"epoch {epoch}/{args.train_epochs}: loss {loss:.3f}, {shares[0]:.1f} % of the pairs matched, "
            f"{shares[1]:.1f} % at least once, {counter.forgotten.sum()} forgetting events"
        )
    return counter.scores()


def as_set(rows, scores, texts, data: Data, args) -> SynSet:
    """The chosen pairs with their captions, file names and scores; the rates are those of the flags.

    Args:
        texts: [M, D_text], in the place of the captions' embeddings, with the real captions nearest to them; or None.
    """
    real, encoder = data.real, data.factory.encoder
    # The pictures are as the test transform gives them, without augmentation.
    pictures = real.row_to_image[rows].tolist()
    images = load_images([real.paths[i] for i in pictures], args.image_size)
    captions = [real.captions[row] for row in rows]
    if texts is None:
        texts = data.real_embed[rows]
    else:
        captions = nearest_captions(texts, data.real_embed, real.captions)
    return SynSet(
        image_syn=normalize(images, encoder.mean, encoder.std),
        text_syn=texts,
        # Nothing was learned: --tune_rates of evaluate.py finds rates that are fair to all sets of a table.
        syn_lr_img=args.lr_teacher_img,
        syn_lr_txt=args.lr_teacher_txt,
        captions=captions,
        mean=encoder.mean,
        std=encoder.std,
        settings=vars(args),
        # Named as in the annotations: paths are another machine's.
        files=[data.records[i].image for i in pictures],
        scores=scores,
    )


if __name__ == "__main__":
    sys.exit(main())
