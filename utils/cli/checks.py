"""Flags that do not go together, refused before anything is read. Every function raises InputError."""

from data.errors import InputError
from utils.scoring import look_epochs
from utils.sets import is_released
from utils.setup import args_of_encoders, encoder_names

# Flags of evaluate.py without effect beside --export and --export_pt.
TABLE_FLAGS = ("all_data", "tune_rates", "looks", "map_captions")
TABLE_FILES = ("markdown", "json", "report")


def check_first_pairs(args) -> None:
    """Of distill.py: first pairs that cannot be, or if nothing is learned, or noise stays as it is."""
    if args.image_only and args.text_only:
        raise InputError("--image_only and --text_only exclude each other; give one, or neither to learn both")
    if args.init_set and args.pix_init == "kmeans":
        raise InputError("--init_set and --pix_init kmeans both give the first pairs; drop one")
    if args.pix_init == "kmeans":
        check_encoder_features(args, "--pix_init kmeans")
    if (args.image_only and args.txt_init == "noise") or (args.text_only and args.pix_init == "noise"):
        raise InputError("the modality that is not learned must start from real values; drop its noise init")


def check_pictures(args) -> None:
    """Of distill.py: what is for learned pixels where there are none."""
    flags = {
        "--syn_aug": args.syn_aug,
        "--pix_limit": args.pix_limit,
        "--pix_param pyramid": args.pix_param == "pyramid",
    }
    given = [flag for flag, value in flags.items() if value]
    for other, taken in (("--text_only", args.text_only), ("--pix_param mixture", args.pix_param == "mixture")):
        if given and taken:
            hint = "; --syn_views is for real ones" if given[0] == "--syn_aug" else ""
            raise InputError(f"{given[0]} is for pictures that are learned as pixels; leave it out with {other}{hint}")
    if args.syn_views and (args.image_trainable or not (args.text_only or args.pix_param == "mixture")):
        raise InputError(
            "--syn_views is for real pictures before a frozen encoder; give --pix_param mixture or --text_only with "
            "--image_trainable False, or --syn_aug for learned pixels"
        )


def check_targets(args) -> None:
    """Of distill.py: soft targets, blending or phases that do not go with the rest."""
    if args.sim_type != "none" and args.loss_type == "InfoNCE":
        raise InputError(f"--loss_type InfoNCE has hard targets; give NCE, BCE or WBCE with --sim_type {args.sim_type}")
    if args.blend_alpha and args.image_trainable:
        raise InputError("--blend_alpha mixes what a frozen image encoder gives; add --image_trainable False")
    if args.phases > args.num_queries:
        raise InputError(f"--phases {args.phases} is more than the {args.num_queries} pairs; lower it")


def check_encoders(args) -> None:
    """Of distill.py and buffer.py: several image encoders, and pictures that are mixed after them."""
    names = encoder_names(vars(args))
    if len(set(names)) < len(names):
        raise InputError(f"--image_encoder names {', '.join(names)}; give each one once")
    if len(names) > 1 and args.image_trainable:
        raise InputError("several image encoders must be frozen; add --image_trainable False")
    if getattr(args, "encoders_per_step", None) and args.encoders_per_step > len(names):
        raise InputError(
            f"--encoders_per_step {args.encoders_per_step} is more than the {len(names)} encoders; lower it"
        )
    args_of_encoders(args)  # refuses checkpoints and arguments of none of them
    if getattr(args, "pix_param", "pixels") == "mixture":
        _check_mixture(args)


def _check_mixture(args) -> None:
    if args.image_trainable:
        raise InputError("--pix_param mixture mixes what a frozen image encoder gives; add --image_trainable False")
    if args.init_set or args.pix_init == "noise":
        raise InputError("--pix_param mixture starts from real pictures; leave out --init_set and --pix_init noise")
    if args.pix_words < args.num_queries:
        raise InputError(f"--pix_words {args.pix_words} is less than the {args.num_queries} pairs; raise it")


def check_sentences(args) -> None:
    """Of distill.py: texts that cannot be made of sentences, or sentences for texts that are not."""
    if args.txt_param == "mixture":
        if args.image_only:
            raise InputError("--txt_param mixture learns texts, and --image_only keeps them; drop one")
        if args.txt_init == "noise":
            raise InputError("--txt_param mixture starts from real texts; leave out --txt_init noise")
    elif args.txt_words:
        raise InputError("--txt_words is what --txt_param mixture makes texts of; add that, or drop it")


def check_coreset(args) -> None:
    """Of coreset.py: flags with which the method cannot work."""
    if args.output and not args.output.endswith(".safetensors"):
        raise InputError(f"--output {args.output} must end in .safetensors")
    if args.method == "forgetting" and args.train_epochs < 2:
        raise InputError("--method forgetting needs --train_epochs of 2 or more: nothing seen once can be forgotten")
    if args.method == "forgetting" and args.batch_size_train < 2:
        raise InputError("--method forgetting needs --batch_size_train of 2 or more: a pair alone is always matched")
    if args.method in ("herding", "kcenter", "kmeans", "prototypes") and args.features != "text":
        check_encoder_features(args, f"--features {args.features}", " or use --features text")


def check_encoder_features(args, flag: str, way_out: str = "") -> None:
    """`flag` would compare features of an image encoder that has learned nothing."""
    if not (args.image_pretrained or args.image_checkpoint):
        raise InputError(
            f"{flag} needs a pretrained image encoder; drop --no_image_pretrained, give --image_checkpoint{way_out}"
        )


def check_texts(args) -> None:
    """Of evaluate.py: sentences for a map that --texts nearest does without."""
    if args.map_captions and args.texts == "nearest":
        raise InputError(
            "--map_captions is for texts carried between text encoders; --texts nearest needs none, drop it"
        )


def check_looks(args) -> None:
    """Of evaluate.py: more looks than epochs."""
    if args.looks:
        look_epochs(args.epoch_eval_train, args.looks)


def asks_for_table(args) -> bool:
    """Of evaluate.py: whether a file of scores is to be written."""
    return any(getattr(args, name) for name in TABLE_FILES)


def check_export(args) -> None:
    """Of evaluate.py: what would have no effect beside --export or --export_pt, or sets that the latter cannot take."""
    if args.license and not args.export:
        raise InputError("--license stands in the card that --export writes; add that, or drop it")
    if not (args.export or args.export_pt) or (args.export and not args.export_pt and asks_for_table(args)):
        return
    flag, names = ("--export", TABLE_FLAGS) if args.export else ("--export_pt", (*TABLE_FLAGS, *TABLE_FILES))
    given = [name for name in names if getattr(args, name)] + (["texts"] if args.texts != "learned" else [])
    if given:
        way_out = ", or ask for scores with --json" if args.export else ""
        raise InputError(f"{flag} trains nothing and writes the sets as they are; leave out --{given[0]}{way_out}")
    if args.export_pt and (args.export or len(set(args.synset)) > 1 or not is_released(args.export_pt)):
        raise InputError("--export_pt takes one set, a file that ends in .pt, and no --export beside it")
