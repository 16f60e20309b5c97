"""Trains fresh models on saved sets of pairs and reports their retrieval recall on the test split.

Data, encoders and training lengths default to those the first set was made with.
"""

import json
import sys
from dataclasses import replace
from pathlib import Path

from data.errors import InputError
from utils import cli
from utils.evaluation import TEST_SEED, VALIDATION_SEED, evaluate_synset, mean_and_std, recall_table
from utils.setup import find_split, make_factory, make_text_encoder, retrieval_pairs
from utils.synset import SynSet, load_synset

# Settings of the first set that are this run's defaults; the last three belong to its image encoder alone.
INHERITED = (
    *("dataset", "image_root", "ann_root", "image_size", "skip_broken", "cache_dir", "batch_size_test", "seed"),
    *("text_encoder", "text_pretrained", "text_pooling", "temperature", "num_eval", "epoch_eval_train", "batch_train"),
    *("image_encoder", "image_trainable", "image_pretrained", "image_checkpoint", "image_kwargs"),
)


def parse_args(argv=None):
    parser = cli.Parser(prog="evaluate.py", description=__doc__)
    add = parser.add_argument
    add("--synset", nargs="+", required=True, help="files that distill.py or coreset.py saved")
    add("--syn_lr_img", type=cli.positive, help="rate of the image tower instead of the set's own")
    add("--syn_lr_txt", type=cli.positive, help="rate of the text tower instead of the set's own")
    parser.add_bool("tune_rates", False, "choose each set's rates on validation, one network per candidate")
    add("--grid_img", nargs="+", type=cli.positive, default=[0.01, 0.1], help="image rates that --tune_rates tries")
    add("--grid_txt", nargs="+", type=cli.positive, default=[0.01, 0.1], help="text rates that --tune_rates tries")
    add("--json", help="write the numbers to this file")
    cli.add_evaluation_flags(parser)
    cli.add_data_flags(parser)
    cli.add_network_flags(parser)
    cli.add_run_flags(parser)
    parser.set_defaults(image_encoder=None)
    return parser.parse(argv, defaults=settings_of_first_set)


def settings_of_first_set(args) -> dict:
    settings = load_synset(args.synset[0]).settings
    inherited = {key: settings[key] for key in INHERITED if key in settings}
    if args.image_encoder not in (None, settings["image_encoder"]):
        for key in INHERITED[-3:]:  # of another encoder
            inherited.pop(key, None)
    return inherited


@cli.one_line_errors
def main(argv=None):
    args = parse_args(argv)
    synsets = {path: with_rates(load_synset(path), args) for path in args.synset}
    splits = {split: find_split(args, split) for split in (["val", "test"] if args.tune_rates else ["test"])}
    text_encoder = make_text_encoder(args)
    test = retrieval_pairs(args, splits["test"], text_encoder)
    validation = retrieval_pairs(args, splits["val"], text_encoder) if args.tune_rates else None
    text_dim = test[1].shape[1]
    for path, synset in synsets.items():
        check_fit(path, synset, args, text_dim)
    factory = make_factory(args, text_dim)

    rows = {}
    for path, synset in synsets.items():
        if args.tune_rates:
            synset = tuned(synset, validation, factory, args)
        results = score(synset, test, args.num_eval, TEST_SEED, factory, args)
        name = f"{Path(path).stem} ({synset.settings['method']}, {len(synset.captions)} pairs)"
        rows[f"{name}, rates {synset.syn_lr_img:.3g} {synset.syn_lr_txt:.3g}"] = results
    print(f"{args.dataset} test, {args.image_encoder} + {args.text_encoder}, {args.num_eval} networks per set:")
    print(recall_table(rows))
    if args.json:
        numbers = {
            name: dict(zip(("mean", "std"), mean_and_std(results), strict=True)) for name, results in rows.items()
        }
        write_numbers(Path(args.json), numbers)


def write_numbers(path: Path, numbers: dict) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(numbers, indent=1) + "\n")
    except OSError as error:
        raise InputError(f"cannot write {path} ({error.strerror}); give another file with --json") from error


def with_rates(synset: SynSet, args) -> SynSet:
    return replace(
        synset,
        syn_lr_img=args.syn_lr_img or synset.syn_lr_img,
        syn_lr_txt=args.syn_lr_txt or synset.syn_lr_txt,
    )


def check_fit(path: str, synset: SynSet, args, text_dim: int) -> None:
    """Raises InputError if the set belongs to another dataset or text encoder."""
    for key in ("dataset", "text_encoder", "text_pooling"):
        if synset.settings[key] != getattr(args, key):
            raise InputError(
                f"{path} was made with {key}={synset.settings[key]}, this run has {key}={getattr(args, key)}; "
                "sets of one table share dataset and text encoder"
            )
    if synset.text_syn.shape[1] != text_dim:
        raise InputError(
            f"{path} holds text embeddings of width {synset.text_syn.shape[1]}, --text_encoder {args.text_encoder} "
            f"gives {text_dim}; use the text encoder it was made with"
        )


def tuned(synset: SynSet, validation, factory, args) -> SynSet:
    """The set with the best rates on validation: its own or one of the grid, one network each."""
    rates = [(synset.syn_lr_img, synset.syn_lr_txt)]
    rates += [(lr_img, lr_txt) for lr_img in args.grid_img for lr_txt in args.grid_txt]
    candidates = [replace(synset, syn_lr_img=lr_img, syn_lr_txt=lr_txt) for lr_img, lr_txt in rates]
    return max(candidates, key=lambda c: score(c, validation, 1, VALIDATION_SEED, factory, args)[0]["r_mean"])


def score(synset: SynSet, retrieval, num_eval: int, seed: int, factory, args) -> list[dict]:
    sizes = num_eval, args.epoch_eval_train, args.batch_train, args.batch_size_test, args.image_size
    return evaluate_synset(factory, synset, retrieval, *sizes, args.temperature, seed + args.seed)


if __name__ == "__main__":
    sys.exit(main())
