"""Trains fresh models on saved sets of pairs and reports their retrieval recall on the test split, in one table.

A row for each set and image encoder. Data, encoders and training lengths default to those the first set was made
with, if it says so; another encoder than a set's own shows how the set transfers to it.
"""

import argparse
import itertools
import json
import shlex
import sys
from dataclasses import replace
from pathlib import Path

from data.errors import InputError
from data.text_cache import embed_captions
from networks.clip_model import trained_parameters
from networks.loss import LOSS_TYPES
from utils import cli, ranks
from utils.cli.recipes import DEMO_DATA, recipe_defaults
from utils.device import describe_device
from utils.experts import LORA, find_trajectories
from utils.files import check_can_write, save_text
from utils.log import Aside
from utils.report import check_installed, write_table_page
from utils.scoring import (
    ALL_DATA,
    TEST_SEED,
    VALIDATION_SEED,
    NonFiniteLoss,
    as_numbers,
    choose_rates,
    compare_rows,
    embedded_once,
    evaluate_retrieval,
    evaluate_synset,
    look_epochs,
    markdown_table,
    mean_and_std,
)
from utils.sets import SynSet, export_released, export_sets, is_released, load_synset
from utils.setup import find_device, find_split, lora_of, make_factory, make_text_encoder, retrieval_pairs

# Settings of the first set that are this run's defaults.
INHERITED = (
    *("dataset", "image_root", "ann_root", "image_size", "skip_broken", "cache_dir", "batch_size_test", "seed"),
    "split_seed",
    *("text_encoder", "text_pretrained", "text_pooling", "num_eval"),
)
# How the networks of one table train: the flag's value, else what all distilled sets say, else the flag's own default.
PROTOCOL = ("epoch_eval_train", "batch_train", "temperature")
# Settings of an image encoder alone: the flag's value, else that of the first set made with it, else this.
OF_ENCODER = {
    **{"image_trainable": True, "image_pretrained": True, "image_checkpoint": None, "image_kwargs": {}},
    "only_has_image_projection": False,
    **dict.fromkeys(LORA),
}
# What the sets of one table share: splits, and where the texts come from; with --texts nearest the splits alone.
OF_SPLITS = "dataset", "split_seed"
SHARED = (*OF_SPLITS, "text_encoder", "text_pooling", "text_pretrained")
# What every set says of how it was made.
MADE_WITH = ("method", "dataset", "image_encoder", "text_encoder")
# Flags without effect beside --export and --export_pt.
OF_TABLE = ("all_data", "tune_rates", "looks", "markdown", "json", "report")


def parse_args(argv=None):
    parser = cli.Parser(prog="evaluate.py", description=__doc__)
    cli.add_data_flags(parser)
    cli.add_network_flags(parser, several=True)
    cli.add_run_flags(parser)
    pairs = parser.section("pairs").add_argument
    pairs(
        "--synset",
        nargs="+",
        required=True,
        metavar="FILE",
        help="files that distill.py or coreset.py saved, or distilled_N.pt of LoRS, RepBlend or PTM-ST",
    )
    pairs("--syn_lr_img", type=cli.positive, help="rate of the image tower instead of the set's own")
    pairs("--syn_lr_txt", type=cli.positive, help="rate of the text tower instead of the set's own")
    pairs("--loss_type", choices=LOSS_TYPES, help="loss to train with instead of the set's own")
    pairs(
        "--texts",
        choices=("learned", "nearest"),
        default="learned",
        help="train on the texts as they are in the set, or on the real captions nearest to them, embedded anew: so a "
        "set can be tried with another --text_encoder",
    )
    cli.add_evaluation_flags(parser)
    evaluation = parser.section("evaluation")
    add = evaluation.add_argument
    add("--all_data", metavar="BUFFER_PATH", help="add a row for training on all pairs: its experts' last snapshots")
    evaluation.add_bool(
        "tune_rates",
        False,
        "choose rates on validation for each set and encoder, from the same candidates for every set: the own rates of "
        "all (learned, if distilled) and each pair of the two grids, one network each; a grid whose edge is best is "
        "extended once, for all sets",
    )
    grid = {"nargs": "+", "type": cli.positive, "default": [0.01, 0.1]}
    add("--grid_img", **grid, help="image rates that --tune_rates tries")
    add("--grid_txt", **grid, help="text rates that --tune_rates tries")
    add(
        "--looks",
        type=cli.number(int, least=0),
        default=0,
        help="also report the best of N looks at the test split while a network trains, which is how several published "
        "numbers were counted; a column of its own beside that of the last epoch",
    )
    output = parser.section("output").add_argument
    output("--markdown", metavar="FILE", help="write the table to this file")
    output("--json", metavar="FILE", help="write the numbers to this file")
    output("--report", metavar="FILE", help="write a page with the table, the pairs and the curves of their run: HTML")
    output(
        "--export",
        metavar="FOLDER",
        help="write the sets' pictures (PNG), captions, embeddings and rates to this new folder instead of training on "
        "them; a sub-folder for each of several sets",
    )
    output("--export_pt", metavar="FILE", help="write the set to this file in the form of LoRS instead; it ends in .pt")
    usual = {key: parser.get_default(key) for key in PROTOCOL}
    parser.set_defaults(image_encoder=None, **dict.fromkeys([*OF_ENCODER, *PROTOCOL]))
    return parser.parse(argv, defaults=lambda args: {**settings_of_first_set(args), **protocol_of_sets(args, usual)})


def load_set(path: str) -> SynSet:
    """Reads a set. Raises InputError if it cannot be read, or is one of ours and does not say how it was made."""
    synset = load_synset(path)
    lacking = [key for key in MADE_WITH if key not in synset.settings]
    if lacking and not is_released(path):
        raise InputError(f"{path} lacks {', '.join(lacking)} among its settings; make it again")
    return synset


def settings_of_first_set(args) -> dict:
    """Defaults from the first set; the parser's own if that does not say how it was made."""
    settings = load_set(args.synset[0]).settings
    if is_released(args.synset[0]):
        named = args.image_encoder or "nfnet"
        return {**dict.fromkeys(OF_ENCODER), "image_encoder": [named] if isinstance(named, str) else named}
    inherited = {key: settings[key] for key in INHERITED if key in settings}
    if inherited["dataset"] == "demo":
        of_demo = recipe_defaults("evaluate.py", "demo", None)
        inherited = {key: value for key, value in of_demo.items() if key in vars(args)} | inherited
    return {**inherited, "image_encoder": [settings["image_encoder"]], **dict.fromkeys(OF_ENCODER)}


def protocol_of_sets(args, usual: dict) -> dict:
    """Defaults for `PROTOCOL`, whatever the order of the sets, and where they come from.

    Raises InputError if distilled sets ask for different ones and no flag decides.
    """
    settings = {path: load_set(path).settings for path in args.synset}
    distilled = {path: made for path, made in settings.items() if PROTOCOL[0] in made}  # a coreset was never scored
    values, sources, conflicts = {}, [], []
    for key in PROTOCOL:
        asked = {path: made[key] for path, made in distilled.items() if key in made}
        values[key] = next(iter(asked.values()), usual[key])
        if getattr(args, key) is not None:
            sources.append(f"--{key} is given")
        elif len(set(asked.values())) > 1:
            path, other = next(pair for pair in itertools.combinations(asked, 2) if asked[pair[0]] != asked[pair[1]])
            conflicts.append(f"--{key} ({path}: {asked[path]}, {other}: {asked[other]})")
    if conflicts and not (args.export or args.export_pt):
        raise InputError(
            f"these sets were scored in different ways, and the networks of one table train alike: give "
            f"{' and '.join(conflicts)}"
        )
    if len(sources) < len(PROTOCOL):
        sources.append(f"as {next(iter(distilled))} was scored" if distilled else "the defaults")
    return {**values, "protocol": ", else ".join(sources)}


@cli.one_line_errors
def main(argv=None):
    args = parse_args(argv)
    synsets = {path: with_flags(load_set(path), args) for path in args.synset}
    if args.export or args.export_pt:
        if ranks.is_first():
            export(synsets, args)
        return
    if args.looks:
        look_epochs(args.epoch_eval_train, args.looks)  # refuses too many
    for path, synset in synsets.items():
        check_shared(path, synset, args)
    by_encoder = encoder_args(args, list(synsets.values()))
    check_outputs(args)

    print(describe_device(find_device(args)))

    # What all rows share: pictures are decoded and captions embedded once.
    with ranks.first_goes_first():
        splits = {split: find_split(args, split) for split in (["val", "test"] if args.tune_rates else ["test"])}
        text_encoder = make_text_encoder(args)
        text_dim = text_encoder.width
        if args.texts == "nearest":
            synsets = {path: with_nearest_texts(synset, text_encoder, args) for path, synset in synsets.items()}
        for path, synset in synsets.items():
            check_width(path, synset, text_dim, args)
        test = retrieval_pairs(args, splits["test"], text_encoder)
        validation = retrieval_pairs(args, splits["val"], text_encoder) if args.tune_rates else None
    del text_encoder

    rows = []
    for name, encoder in by_encoder.items():
        factory = make_factory(encoder, text_dim, args.eval_full)
        looked_at = factory, args.batch_size_test, args.cache_dir
        seen_test = embedded_once(test, *looked_at)
        seen_validation = embedded_once(validation, *looked_at) if args.tune_rates else None
        of_encoder = tuned(synsets, seen_validation, factory, args) if args.tune_rates else synsets
        for path, synset in of_encoder.items():
            try:
                results = score(synset, seen_test, args.num_eval, TEST_SEED, factory, args)
            except NonFiniteLoss as error:
                print(f"no row for {path} on {name}: {error}")
                continue
            rows.append(row_of_set(path, synset, name, factory.trains, results, args))
            announce(rows[-1])
        if args.all_data:
            of_experts = make_factory(encoder, text_dim) if factory.lora != lora_of(encoder) else factory
            row = row_of_experts(of_experts, seen_test, encoder, is_first=name == args.image_encoder[0])
            if row:
                rows.append(row)
                announce(row)
    if not ranks.is_first():
        return
    if not rows:
        raise InputError("no set could be trained on; give lower --syn_lr_img and --syn_lr_txt, or --tune_rates")
    write_tables(rows, args)
    if args.report:
        command = shlex.join(["evaluate.py", *(sys.argv[1:] if argv is None else argv)])
        with Aside()("the page"):
            write_table_page(
                Path(args.report), list(map(Path, args.synset)), [as_numbers(row) for row in rows], command
            )


def check_outputs(args) -> None:
    """Raises InputError for what could not be written at the end."""
    for file in filter(None, (args.markdown, args.json, args.report)):
        check_can_write(file)
    if args.report:
        check_installed()


def with_flags(synset: SynSet, args) -> SynSet:
    """The set with the rates and the loss of the command line where it gives them."""
    return replace(
        synset,
        syn_lr_img=args.syn_lr_img or synset.syn_lr_img,
        syn_lr_txt=args.syn_lr_txt or synset.syn_lr_txt,
        loss_type=args.loss_type or synset.loss_type,
    )


def with_nearest_texts(synset: SynSet, text_encoder, args) -> SynSet:
    """The set with the embeddings of its captions, the real ones nearest to its texts, in their place."""
    return replace(synset, text_syn=embed_captions(synset.captions, text_encoder, args.cache_dir))


def export(synsets: dict[str, SynSet], args) -> None:
    """Writes the sets to --export, or the set to --export_pt. Raises InputError for flags and sets it cannot take."""
    flag = "--export" if args.export else "--export_pt"
    given = [name for name in OF_TABLE if getattr(args, name)] + (["texts"] if args.texts != "learned" else [])
    if given:
        raise InputError(f"{flag} trains nothing and writes the sets as they are; leave out --{given[0]}")
    if args.export_pt:
        if args.export or len(synsets) > 1 or not is_released(args.export_pt):
            raise InputError("--export_pt takes one set, a file that ends in .pt, and no --export beside it")
        ((path, synset),) = synsets.items()
        export_released(args.export_pt, synset)
        print(f"{len(synset.captions)} pairs of {path} in {args.export_pt}")
        return
    names = {Path(path).stem for path in synsets}
    if len(names) < len(synsets):
        raise InputError(f"--export {args.export} names sub-folders after files, two of which have one name; rename it")
    export_sets(args.export, {Path(path).stem: synset for path, synset in synsets.items()})
    pictures = sum(len(synset.captions) for synset in synsets.values())
    print(f"{pictures} pictures with metadata.jsonl and texts.safetensors in {args.export}")


def check_shared(path: str, synset: SynSet, args) -> None:
    """Raises InputError if the set belongs to another dataset or text encoder, or has no captions to embed."""
    if is_released(path):  # it does not say
        if args.texts == "nearest":
            raise InputError(f"{path} holds no captions, which --texts nearest would embed; leave that out")
        return
    made_with = {"split_seed": args.split_seed, **synset.settings}  # sets from before that flag do not say
    for key in SHARED if args.texts == "learned" else OF_SPLITS:
        if made_with.get(key) != getattr(args, key):
            raise InputError(
                f"{path} was made with {key}={made_with.get(key)}, this run has {key}={getattr(args, key)}; "
                "sets of one table share dataset, splits and text encoder, but see --texts nearest"
            )


def check_width(path: str, synset: SynSet, text_dim: int, args) -> None:
    """Raises InputError if the set's text embeddings are not the text encoder's."""
    if synset.text_syn.shape[1] != text_dim:
        raise InputError(
            f"{path} holds text embeddings of width {synset.text_syn.shape[1]}, --text_encoder {args.text_encoder} "
            f"gives {text_dim}; use the text encoder it was made with, or --texts nearest"
        )


def encoder_args(args, synsets: list[SynSet]) -> dict[str, argparse.Namespace]:
    """The command line for each image encoder alone, by its name; see `OF_ENCODER`."""
    names, checkpoints = args.image_encoder, args.image_checkpoint or []
    if checkpoints and len(checkpoints) != len(names):
        raise InputError(
            f"--image_checkpoint has {len(checkpoints)} values for {len(names)} image encoders; "
            "give one for each, 'none' for published weights"
        )
    by_encoder = {}
    known = [synset.settings for synset in synsets] + ([DEMO_DATA] if args.dataset == "demo" else [])
    for i, name in enumerate(names):
        made_with = next((settings for settings in known if settings.get("image_encoder") == name), {})
        values = {key: made_with.get(key, value) for key, value in OF_ENCODER.items()}
        values |= {key: getattr(args, key) for key in OF_ENCODER if getattr(args, key) not in (None, {})}
        if checkpoints:
            values["image_checkpoint"] = None if checkpoints[i] == "none" else checkpoints[i]
        by_encoder[name] = argparse.Namespace(**{**vars(args), "image_encoder": name, **values})
    return by_encoder


def tuned(synsets: dict[str, SynSet], validation, factory, args) -> dict[str, SynSet]:
    """The sets with the best rates on validation, by one network each; see `choose_rates`."""
    args = argparse.Namespace(**{**vars(args), "looks": 0})  # those are at the test split

    def recall(path: str, rates) -> float:
        return score(with_rates(synsets[path], rates), validation, 1, VALIDATION_SEED, factory, args)[0]["r_mean"]

    own = {path: (synset.syn_lr_img, synset.syn_lr_txt) for path, synset in synsets.items()}
    best, lines = choose_rates(own, (args.grid_img, args.grid_txt), recall)
    for line in lines:
        print(line)
    return {path: with_rates(synset, best[path]) for path, synset in synsets.items()}


def with_rates(synset: SynSet, rates) -> SynSet:
    return replace(synset, syn_lr_img=rates[0], syn_lr_txt=rates[1])


def score(synset: SynSet, retrieval, num_eval: int, seed: int, factory, args) -> list[dict]:
    sizes = num_eval, args.epoch_eval_train, args.batch_train, args.batch_size_test, args.image_size
    return evaluate_synset(factory, synset, retrieval, *sizes, args.temperature, seed + args.seed, looks=args.looks)


def row_of_experts(factory, test, args, is_first: bool) -> dict | None:
    """Test recalls of each expert's last snapshot; None, and a printed line, if a transfer encoder has no experts."""
    model, device = factory.fresh(args.seed), find_device(args)
    settings = {**vars(args), "lora_base": factory.base}
    try:
        experts = find_trajectories(args.all_data, settings, trained_parameters(model))
    except InputError as error:
        if is_first:
            raise
        print(f"no all-data row for {args.image_encoder}: {error}")
        return None

    def score_expert(expert) -> dict[str, float]:
        model.load_state_dict(expert.snapshot(expert.epochs[-1]), strict=False)
        return evaluate_retrieval(model, *test, args.batch_size_test, device)

    results = ranks.spread(score_expert, experts)
    names = {"set": ALL_DATA, "method": ALL_DATA, "image_encoder": args.image_encoder, "trains": factory.trains}
    epochs = max(expert.epochs[-1] for expert in experts)
    return {**names, "experts": len(experts), "epochs": epochs, "results": results}


def row_of_set(path: str, synset: SynSet, image_encoder: str, trains: str, results, args) -> dict:
    row = {
        "set": path,
        "method": synset.settings["method"],
        "pairs": len(synset.captions),
        "image_encoder": image_encoder,
        "trains": trains,
        "rates": [synset.syn_lr_img, synset.syn_lr_txt],
        "loss_type": synset.loss_type,
        "texts": args.texts,
        "results": results,
    }
    return {**row, "looks": args.looks} if args.looks else row


def announce(row: dict) -> None:
    mean, std = mean_and_std(row["results"])
    print(f"{row['set']} on {row['image_encoder']}: mean recall {mean['r_mean']:.1f} ± {std['r_mean']:.1f}")


def write_tables(rows: list[dict], args) -> None:
    """Prints the table and how the sets compare; writes the table to --markdown and its numbers to --json."""
    networks = f"mean ± std over {args.num_eval} networks per set"
    trained = f"{args.epoch_eval_train} epochs in batches of {args.batch_train} ({args.protocol})"
    head = f"{args.dataset} test, text encoder {args.text_encoder}, {networks}, each trained {trained}"
    text = f"{head}:\n\n{markdown_table(rows)}\n"
    print(text, end="")
    shared = {"dataset": args.dataset, "text_encoder": args.text_encoder, "num_eval": args.num_eval}
    shared |= {key: getattr(args, key) for key in (*PROTOCOL, "protocol")}
    numbers = {**shared, "seed": args.seed, "rows": [as_numbers(row) for row in rows]}
    for file, content in ((args.markdown, text), (args.json, json.dumps(numbers, indent=1) + "\n")):
        if file:
            save_text(file, content)
    for line in compare_rows(rows):
        print(line)


if __name__ == "__main__":
    sys.exit(main())
