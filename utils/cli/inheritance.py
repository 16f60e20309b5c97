"""What evaluate.py takes over from the sets that it scores, and what these must have in common."""

import argparse
import itertools
from dataclasses import replace
from pathlib import Path

from data.errors import InputError
from utils.cli.parser import Parser
from utils.cli.recipes import DEMO_DATA, recipe_defaults
from utils.experts import LORA
from utils.sets import LEFT_OUT, SynSet, load_synset, shown_path
from utils.setup import encoder_names, settings_of_encoder

# Settings of the first set that are this run's defaults.
INHERITED = (
    *("dataset", "image_root", "ann_root", "image_size", "skip_broken", "cache_dir", "batch_size_test", "seed"),
    "split_seed",
    *("text_encoder", "text_pretrained", "text_pooling", "num_eval"),
)
# How the networks of one table train: the flag's value, else what all distilled sets say, else the flag's own default.
PROTOCOL = ("epoch_eval_train", "batch_train", "temperature", "eval_views")
BEFORE = {"eval_views": 0}  # of distilled sets that do not say, from before there was such a flag
# Settings of an image encoder alone: the flag's value, else that of the first set made with it, else this.
OF_ENCODER = {
    **{"image_trainable": True, "image_pretrained": True, "image_checkpoint": None, "image_kwargs": {}},
    "only_has_image_projection": False,
    **dict.fromkeys(LORA),
}
# What the sets of one table share. Texts of another text encoder are carried over, see `utils.setup.texts`.
SHARED = "dataset", "split_seed"
# Arguments of timm and torchvision by which a set could have other files read than its settings show.
NAMES_OF_FILES = "checkpoint_path", "pretrained_cfg", "pretrained_cfg_overlay", "cache_dir", "weights"
# What every set says of how it was made.
MADE_WITH = ("method", "dataset", "image_encoder", "text_encoder")


def load_set(path: str) -> SynSet:
    """Reads a set. Raises InputError if it cannot be read, or is one of ours and does not say how it was made."""
    synset = load_synset(path)
    lacking = [key for key in MADE_WITH if key not in synset.settings]
    if lacking and not synset.is_from_elsewhere:
        raise InputError(f"{path} lacks {', '.join(lacking)} among its settings; make it again")
    return synset


def check_settings(args, parser: Parser) -> None:
    """Raises InputError if a set, which may be a stranger's, has settings that the flags of their names refuse."""
    for path in args.synset:
        for key, value in load_set(path).settings.items():
            if problem := _problem(key, value, args, parser):
                raise InputError(f"{path} has among its settings {key} {ascii(value)}: {problem}; make it again")


def _problem(key: str, value, args, parser: Parser) -> str | None:
    if key == "method":
        return None if isinstance(value, str) and value.isprintable() else "is no printable text"
    if key == LEFT_OUT:
        return None if isinstance(value, dict) else "is no table of names"
    if key not in (*INHERITED, *PROTOCOL, *OF_ENCODER, "image_encoder") or (value is None and key in OF_ENCODER):
        return None
    if key == "image_encoder" and not value:
        return "names none"
    if key == "image_kwargs" and isinstance(value, dict) and not args.image_kwargs:
        files = next((name for name in value if _names_a_file(name.rpartition(":")[2], value[name])), None)
        if files:
            return f"{files} names a file or an address, which you can only give yourself, with --image_kwargs"
    return parser.misfit(key, value)


def _names_a_file(key: str, value) -> bool:
    """Whether the argument of timm or torchvision can; tables of numbers, such as mean and std, cannot."""
    numbers = value.values() if isinstance(value, dict) else [value]
    flat = [part for entry in numbers for part in (entry if isinstance(entry, list) else [entry])]
    return key in NAMES_OF_FILES and not all(isinstance(part, int | float) for part in flat)


def settings_of_first_set(args) -> dict:
    """Defaults from the first set; the parser's own if that does not say how it was made."""
    synset = load_set(args.synset[0])
    settings = synset.settings
    if synset.is_from_elsewhere:
        named = args.image_encoder or "nfnet"
        return {**dict.fromkeys(OF_ENCODER), "image_encoder": [named] if isinstance(named, str) else named}
    inherited = {key: settings[key] for key in INHERITED if key in settings}
    # What would be made where it is missing is made in a place that this run's command line names, not a set's.
    made = ("cache_dir", "image_root", "ann_root") if inherited["dataset"] == "demo" else ("cache_dir",)
    inherited = {k: v for k, v in inherited.items() if k not in made or Path(v).expanduser().is_dir()}
    if inherited["dataset"] == "demo":
        demo = recipe_defaults("evaluate.py", "demo", None)
        inherited = {key: value for key, value in demo.items() if key in vars(args)} | inherited
    return {**inherited, "image_encoder": encoder_names(settings), **dict.fromkeys(OF_ENCODER)}


def protocol_of_sets(args, usual: dict) -> dict:
    """Defaults for `PROTOCOL`, whatever the order of the sets, and where they come from.

    Raises InputError if distilled sets ask for different ones and no flag decides.
    """
    settings = {path: load_set(path).settings for path in args.synset}
    # A coreset was never scored.
    distilled = {path: {**BEFORE, **made} for path, made in settings.items() if PROTOCOL[0] in made}
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
        sources.append(f"as {shown_path(next(iter(distilled)))} was scored" if distilled else "the defaults")
    return {**values, "protocol": ", else ".join(sources)}


def with_flags(synset: SynSet, args) -> SynSet:
    """The set with the rates and the loss of the command line where it gives them."""
    return replace(
        synset,
        syn_lr_img=args.syn_lr_img or synset.syn_lr_img,
        syn_lr_txt=args.syn_lr_txt or synset.syn_lr_txt,
        loss_type=args.loss_type or synset.loss_type,
        rates={} if args.syn_lr_img or args.syn_lr_txt else synset.rates,
    )


def check_shared(synsets: dict[str, SynSet], args) -> None:
    """Raises InputError if a set belongs to another dataset or to other splits, or has no captions to embed."""
    for path, synset in synsets.items():
        _check_shared(path, synset, args)


def _check_shared(path: str, synset: SynSet, args) -> None:
    if synset.is_from_elsewhere:  # it does not say
        if args.texts == "nearest" and not synset.is_captioned:
            raise InputError(f"{path} holds no captions, which --texts nearest would embed; leave that out")
        return
    made_with = {"split_seed": args.split_seed, **synset.settings}  # sets from before that flag do not say
    for key in SHARED:
        if made_with.get(key) != getattr(args, key):
            raise InputError(
                f"{path} was made with {key}={made_with.get(key)}, this run has {key}={getattr(args, key)}; "
                "sets of one table share dataset and splits"
            )


def check_rates(synsets: dict[str, SynSet], args) -> None:
    """Raises InputError if a set has no rates and this run none for it."""
    for path, synset in synsets.items():
        if None in (synset.syn_lr_img, synset.syn_lr_txt) and not args.tune_rates:
            raise InputError(
                f"{path} is pictures with captions, without rates; give --syn_lr_img and --syn_lr_txt, or --tune_rates"
            )


def check_left_out(synsets: dict[str, SynSet], args) -> None:
    """Raises InputError if the first set's folder left out paths that this run has no others for.

    An image checkpoint is asked for by `encoder_args`, which knows the encoders.
    """
    path, synset = next(iter(synsets.items()))
    left_out = synset.settings.get(LEFT_OUT, {})
    encoder, pictures = Path(args.text_encoder).expanduser(), Path(args.image_root).expanduser()
    if "text_encoder" in left_out and args.text_encoder == left_out["text_encoder"] and not encoder.is_dir():
        raise InputError(
            f"{path} was made with a text encoder in a folder {args.text_encoder}, whose place it does not say; "
            "give it with --text_encoder"
        )
    if "image_root" in left_out and args.dataset != "demo" and not pictures.is_dir():
        raise InputError(
            f"{path} does not say where the pictures of {args.dataset} are, and {pictures} is no folder; give it "
            "with --image_root, and that of the annotations with --ann_root"
        )


def check_widths(synsets: dict[str, SynSet], text_dim: int, args) -> None:
    """Raises InputError if a set's text embeddings are not the text encoder's."""
    for path, synset in synsets.items():
        if synset.text_syn.shape[1] != text_dim:
            raise InputError(
                f"{path} holds text embeddings of width {synset.text_syn.shape[1]}, --text_encoder {args.text_encoder} "
                f"gives {text_dim}; use the text encoder it was made with, or --texts nearest"
            )


def encoder_args(args, synsets: list[SynSet]) -> dict[str, argparse.Namespace]:
    """The command line for each image encoder alone, by its name; see `OF_ENCODER`."""
    by_encoder = {}
    known = [synset.settings for synset in synsets] + ([DEMO_DATA] if args.dataset == "demo" else [])
    known = [settings for settings in known if "image_encoder" in settings]
    for name in args.image_encoder:
        made_with = next((settings for settings in known if name in encoder_names(settings)), None)
        if made_with and not args.image_checkpoint:
            made_with = _with_checkpoint(made_with, args)
        made_with = settings_of_encoder({**OF_ENCODER, **made_with}, name) if made_with else {}
        values = {key: made_with.get(key, value) for key, value in OF_ENCODER.items()}
        given = settings_of_encoder(vars(args), name)
        values |= {key: given[key] for key in OF_ENCODER if given[key] not in (None, {})}
        if args.image_checkpoint:
            values["image_checkpoint"] = given["image_checkpoint"]  # 'none' too
        by_encoder[name] = argparse.Namespace(**{**given, **values})
    return by_encoder


def _with_checkpoint(settings: dict, args) -> dict:
    """A set's settings with the demo's checkpoint where that was left out. Raises InputError for another one."""
    names = settings.get(LEFT_OUT, {}).get("image_checkpoint")
    if not names:
        return settings
    if args.dataset == "demo" and names == Path(DEMO_DATA["image_checkpoint"]).name:
        return {**settings, "image_checkpoint": DEMO_DATA["image_checkpoint"]}
    encoders, files = (" ".join(v if isinstance(v, list) else [v]) for v in (settings["image_encoder"], names))
    raise InputError(
        f"a set was made with the checkpoint {files} of {encoders}, whose place its folder does not say; give it with "
        "--image_checkpoint, or none there for published weights"
    )
