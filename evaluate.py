"""Trains fresh models on saved sets of pairs and reports their retrieval recall on the test split, in one table.

A row for each set and image encoder. Data, encoders and training lengths default to those the first set was made
with, if it says so; another encoder than a set's own shows how the set transfers to it.
"""

import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from data.errors import InputError
from networks.clip_model import ModelFactory, trained_parameters
from networks.loss import LOSS_TYPES
from utils import cli, ranks
from utils.cli.checks import asks_for_table, check_export, check_looks, check_texts
from utils.cli.inheritance import (
    OF_ENCODER,
    PROTOCOL,
    check_left_out,
    check_rates,
    check_settings,
    check_shared,
    check_widths,
    encoder_args,
    load_set,
    protocol_of_sets,
    settings_of_first_set,
    with_flags,
)
from utils.device import describe_device
from utils.experts import find_trajectories
from utils.files import check_can_write, save_text
from utils.log import Aside
from utils.report import check_installed, write_table_page
from utils.scoring import (
    ALL_DATA,
    TEST_SEED,
    VALIDATION_SEED,
    NonFiniteLoss,
    Rates,
    as_numbers,
    choose_rates,
    compare_rows,
    embedded_once,
    encoder_table,
    evaluate_retrieval,
    evaluate_synset,
    markdown_table,
    mean_and_std,
    mean_text,
    row_of_set,
)
from utils.sets import SynSet, check_new_folder, shown_command, shown_path, shown_text_encoder
from utils.setup import (
    export,
    find_device,
    find_split,
    lora_of,
    make_evaluation,
    make_factory,
    make_text_encoder,
    retrieval_pairs,
    with_texts,
)


def parse_args(argv=None):
    parser = cli.Parser(prog="evaluate.py", description=__doc__)
    cli.add_data_flags(parser)
    cli.add_network_flags(parser, several="store")
    cli.add_run_flags(parser)
    pairs = parser.section("pairs").add_argument
    pairs(
        "--synset",
        nargs="+",
        required=True,
        metavar="FILE",
        help="files that distill.py or coreset.py saved, folders that --export wrote or that hold pictures "
        "with captions (metadata.jsonl), or distilled_N.pt of LoRS, RepBlend or PTM-ST",
    )
    pairs("--syn_lr_img", type=cli.positive, help="rate of the image tower instead of the set's own")
    pairs("--syn_lr_txt", type=cli.positive, help="rate of the text tower instead of the set's own")
    pairs("--loss_type", choices=LOSS_TYPES, help="loss to train with instead of the set's own")
    pairs(
        "--texts",
        choices=("learned", "nearest"),
        default="learned",
        help="train on the set's own texts, carried over if --text_encoder is not the one they were made with: by a "
        "linear map or, of real pairs, by embedding their captions anew; or on the real captions nearest to them",
    )
    pairs(
        "--map_captions",
        metavar="FILE",
        help="fit that map on these sentences, one a line or a .json list, instead of the training captions",
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
    add_output_flags(parser)
    usual = {key: parser.get_default(key) for key in PROTOCOL}
    parser.set_defaults(image_encoder=None, **dict.fromkeys([*OF_ENCODER, *PROTOCOL]))

    def defaults(args) -> dict:
        check_settings(args, parser)
        return {**settings_of_first_set(args), **protocol_of_sets(args, usual)}

    return parser.parse(argv, defaults)


def add_output_flags(parser: cli.Parser) -> None:
    output = parser.section("output").add_argument
    output("--markdown", metavar="FILE", help="write the table to this file")
    output("--json", metavar="FILE", help="write the numbers to this file")
    output("--report", metavar="FILE", help="write a page with the table, the pairs and the curves of their run: HTML")
    output(
        "--export",
        metavar="FOLDER",
        help="write the set as pictures (PNG), captions, embeddings and how to train on them to this new folder, which "
        "--synset reads; nothing trains unless --markdown, --json or --report asks for scores, which its card then has "
        "too; a sub-folder for each of several sets",
    )
    output("--license", metavar="NAME", type=cli.license_name, help="of what --export writes, for its card: cc-by-4.0")
    output("--export_pt", metavar="FILE", help="write the set to this file in the form of LoRS instead; it ends in .pt")


@cli.one_line_errors
def main(argv=None):
    args = parse_args(argv)
    synsets = {path: with_flags(load_set(path), args) for path in args.synset}
    check_export(args)
    if args.export_pt or (args.export and not asks_for_table(args)):
        if ranks.is_first():
            export(synsets, args)
        return
    given = synsets

    # What cannot work is refused before anything is read. The networks of one table train alike, but each image
    # encoder has its own checkpoint, adapters and projection: its own command line.
    check_looks(args)
    check_texts(args)
    check_shared(synsets, args)
    check_left_out(synsets, args)
    check_rates(synsets, args)
    by_encoder = encoder_args(args, list(synsets.values()))
    check_outputs(args)
    print(describe_device(find_device(args)))
    synsets, test, validation = open_splits(synsets, args)

    # A row for each encoder and set, and one for all data where its experts are there.
    rows = []
    for name, own_args in by_encoder.items():
        factory = make_factory(own_args, test[1].shape[1], train_in_full=args.eval_full)
        # A frozen encoder sees the pictures once for all sets.
        seen_test = embedded_once(test, factory, args.batch_size_test, args.cache_dir)
        candidates = {path: synset.for_encoder(name) for path, synset in synsets.items()}
        # Learned rates fit the network that they were learned with; on another one each set gets its best ones.
        if args.tune_rates:
            seen_validation = embedded_once(validation, factory, args.batch_size_test, args.cache_dir)
            candidates = tuned(candidates, seen_validation, factory, args)
        for row in rows_of_sets(candidates, seen_test, name, factory, args):
            announce(row)
            rows.append(row)
        if args.all_data:
            # The upper bound: training on all real pairs, which the experts have done already.
            row = row_of_experts(factory, seen_test, own_args, is_first=name == args.image_encoder[0])
            if row:
                announce(row)
                rows.append(row)

    # Every rank has all rows; the first one writes them.
    if not ranks.is_first():
        return
    if not rows:
        raise InputError("no set could be trained on; give lower --syn_lr_img and --syn_lr_txt, or --tune_rates")
    write_tables(rows, args)
    if args.export:
        export(given, args, [as_numbers(row) for row in rows])
    if args.report:
        command = shown_command(["evaluate.py", *(sys.argv[1:] if argv is None else argv)])
        files, numbers = list(map(Path, args.synset)), [as_numbers(row) for row in rows]
        with Aside()("the page"):  # the table is written: a page that fails must not be an error
            write_table_page(Path(args.report), files, numbers, command)


def check_outputs(args) -> None:
    """Raises InputError for what could not be written at the end."""
    # Before the work of hours, not after it.
    files = [file for file in (args.markdown, args.json, args.report) if file]
    if len({Path(file).absolute() for file in files}) < len(files):
        raise InputError(f"--markdown, --json and --report cannot share the file {files[-1]}; give each its own")
    for file in files:
        check_can_write(file)
    if args.export:
        check_new_folder(args.export)
    if args.report:
        check_installed()  # what draws the page's curves


def open_splits(synsets: dict[str, SynSet], args) -> tuple[dict, tuple, tuple | None]:
    """What all rows share: the sets with their texts, the test split, and the validation split with --tune_rates.

    Both splits are (RetrievalSet, text_embed [C, D_text]). Pictures are decoded and captions embedded once.
    """
    with ranks.first_goes_first():  # what it downloads and caches, the others find
        # Rates are tuned on validation; where none are, its pictures need not be there.
        splits = {split: find_split(args, split) for split in (["val", "test"] if args.tune_rates else ["test"])}
        text_encoder = make_text_encoder(args)
        synsets = with_texts(synsets, text_encoder, args)
        # After the line above: texts that are carried over or embedded anew fit where the set's own do not.
        check_widths(synsets, text_encoder.width, args)
        test = retrieval_pairs(args, splits["test"], text_encoder)
        validation = retrieval_pairs(args, splits["val"], text_encoder) if args.tune_rates else None
    return synsets, test, validation


def tuned(synsets: dict[str, SynSet], validation, factory: ModelFactory, args) -> dict[str, SynSet]:
    """The sets with the best rates on validation, by one network each; see `choose_rates`."""

    def recall(path: str, rates: Rates) -> float:
        synset = with_rates(synsets[path], rates)
        # No looks: those are at the test split.
        return score(synset, validation, 1, VALIDATION_SEED, factory, args, looks=0)[0]["r_mean"]

    # Every set is tried with the same candidates: its own rates, the other sets', and the two grids.
    own = {path: Rates(synset.syn_lr_img, synset.syn_lr_txt) for path, synset in synsets.items()}
    own = {path: None if None in rates else rates for path, rates in own.items()}
    best, lines = choose_rates(own, (args.grid_img, args.grid_txt), recall)
    for line in lines:
        print(line)
    return {path: with_rates(synset, best[path]) for path, synset in synsets.items()}


def with_rates(synset: SynSet, rates: Rates) -> SynSet:
    return replace(synset, syn_lr_img=rates.image, syn_lr_txt=rates.text)


def score(synset: SynSet, retrieval, num_eval: int, seed: int, factory, args, looks: int = 0) -> list[dict]:
    """Recalls of `num_eval` networks trained on the set."""
    # Each call starts from its seed alone: rows do not depend on the rows before them.
    evaluation = replace(make_evaluation(args, looks), num_eval=num_eval)
    return evaluate_synset(factory, synset, retrieval, evaluation, seed + args.seed)


def rows_of_sets(synsets: dict[str, SynSet], test, image_encoder: str, factory: ModelFactory, args) -> Iterator[dict]:
    """A row for each set on one image encoder; a printed line in its place where the loss of a network diverges."""
    for path, synset in synsets.items():
        try:
            results = score(synset, test, args.num_eval, TEST_SEED, factory, args, looks=args.looks)
        except NonFiniteLoss as error:
            print(f"no row for {path} on {image_encoder}: {error}")
            continue  # the other rows are worth having
        yield row_of_set(path, synset, image_encoder, factory.trains, results, args.looks)


def row_of_experts(factory: ModelFactory, test, args, is_first: bool) -> dict | None:
    """Test recalls of each expert's last snapshot; None, and a printed line, if a transfer encoder has no experts."""
    # Experts have the adapters that they were trained with, whatever --eval_full says of networks that score sets.
    if factory.lora != lora_of(args):
        factory = make_factory(args, factory.text_dim)
    model, device = factory.fresh(args.seed), find_device(args)
    settings = {**vars(args), "lora_base": factory.base}  # adapters fit the weights that they were trained over
    try:
        experts = find_trajectories(args.all_data, settings, trained_parameters(model))
    except InputError as error:
        if is_first:  # the encoder that the experts are for: a wrong folder, not a transfer
            raise
        print(f"no all-data row for {args.image_encoder}: {error}")
        return None

    def score_expert(expert) -> dict[str, float]:
        # Not strict: a snapshot holds what trained alone.
        model.load_state_dict(expert.snapshot(expert.epochs[-1]), strict=False)
        return evaluate_retrieval(model, *test, args.batch_size_test, device)

    results = ranks.spread(score_expert, experts)  # the ranks share the experts
    names = {"set": ALL_DATA, "method": ALL_DATA, "image_encoder": args.image_encoder, "trains": factory.trains}
    epochs = max(expert.epochs[-1] for expert in experts)
    return {**names, "experts": len(experts), "epochs": epochs, "results": results}


def announce(row: dict) -> None:
    mean, std = mean_and_std(row["results"])
    print(f"{row['set']} on {row['image_encoder']}: mean recall {mean_text(mean['r_mean'], std['r_mean'])}")


def shown_sets(rows: list[dict]) -> dict[str, str]:
    """The rows' sets by their paths, as `shown_path` names them; with a number where two would be one."""
    names = {}
    for path in dict.fromkeys(row["set"] for row in rows):
        name = path if path == ALL_DATA else shown_path(path)
        names[path] = name if name not in names.values() else f"{name} ({len(names) + 1})"
    return names


def write_tables(rows: list[dict], args) -> None:
    """Prints the table and how the sets compare; writes the table to --markdown and its numbers to --json."""
    networks = f"mean ± std over {args.num_eval} networks per set, temperature {args.temperature:g}"
    views = f", a picture in one of {args.eval_views + 1} views an epoch" if args.eval_views else ""
    trained = f"{args.epoch_eval_train} epochs in batches of {args.batch_train}{views} ({args.protocol})"
    text_encoder = shown_text_encoder(args.text_encoder)
    head = f"{args.dataset} test, text encoder {text_encoder}, {networks}, each trained {trained}"
    names = shown_sets(rows)  # what is written may be given away: it names no place of this machine
    rows = [{**row, "set": names[row["set"]]} for row in rows]
    text = f"{head}:\n\n{markdown_table(rows)}\n"  # as it is in the Markdown file
    print(text, end="")
    # The file of numbers says how they were made, so that tables can be compared later.
    shared = {"dataset": args.dataset, "text_encoder": text_encoder, "num_eval": args.num_eval}
    shared |= {key: getattr(args, key) for key in (*PROTOCOL, "protocol")}
    numbers = {**shared, "seed": args.seed, "rows": [as_numbers(row) for row in rows]}
    for file, content in ((args.markdown, text), (args.json, json.dumps(numbers, indent=1) + "\n")):
        if file:
            save_text(file, content)
    # In words what the reader would compute from the table: each set as a multiple of the first and of all data.
    for line in compare_rows(rows):
        print(line)
    # Of several image encoders the same in short, last: what a reader looks for first.
    if short := encoder_table(rows):
        print(f"\nin brackets the share of {ALL_DATA}; * on an encoder that the pairs were learned through:\n\n{short}")


if __name__ == "__main__":
    sys.exit(main())
