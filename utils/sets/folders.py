"""Folders that hold a set as pictures, captions and numbers for any program: what is in them, and how they are read.

`metadata.jsonl` has a line {"file_name", "text"} for each pair, as Hugging Face's image folders have; `set.json` says
how to train on the pairs and how they were made; `texts.safetensors` holds the text embeddings, soft targets and
weights of mixtures, whose real pictures are the files of `words`. Texts that are sums of sentences have these in their
line, {"sentences", "weights"}. `utils.sets.export` writes them. A folder with the
first of these files alone holds pairs of another program.
"""

import os
import re
import shlex
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

import numpy as np
import torch
from torch import Tensor

from data.annotations import clean_caption
from data.errors import InputError
from data.forms import parse_json
from data.pairs import open_picture
from data.transforms import normalize
from utils.files import open_tensors
from utils.forms import Sentences
from utils.sets.misfit import is_number

LINES, ABOUT, TENSORS, WORDS = "metadata.jsonl", "set.json", "texts.safetensors", "words"
KIND = "folder of pairs"
TENSORS_KIND = "texts of a folder of pairs"
# What set.json says of training: parts of the set, and how its run scored it, by the names of that run's flags.
PARTS = "syn_lr_img", "syn_lr_txt", "rates", "loss_type", "alpha", "phases", "mean", "std"
SCORED_BY = {"epochs": "epoch_eval_train", "batch_size": "batch_train", "temperature": "temperature"}
# Settings that are paths of the machine that made the set; LEFT_OUT among the settings names those that it had.
PATHS = (
    *("image_root", "ann_root", "buffer_path", "save_dir", "cache_dir", "image_checkpoint", "init_set", "output"),
    *("coreset", "txt_words"),
)
LEFT_OUT = "left_out"
LOCAL = re.compile(r"(?:^|:)(?:~|\.{1,2})?[\\/]|^[A-Za-z]:[\\/]")  # how absolute paths and those from here begin
ADVICE = "export the set again"
CAPTIONED = "pictures with captions"  # the method of pairs of another program
UNIT = [0.0] * 3, [1.0] * 3  # their mean and std: pixels as they are


def without_paths(settings: dict) -> dict:
    """The settings without paths of this machine.

    A text encoder's folder becomes its last name. `LEFT_OUT` has what was left out or cut, by setting: the last name of
    a checkpoint or encoder, None for other paths.
    """
    kept, left_out = {}, dict(settings.get(LEFT_OUT, {}))
    for key, value in settings.items():
        if key in PATHS and _names_a_file(value):
            left_out[key] = last_names(value, always=True) if key == "image_checkpoint" else None
        elif key != LEFT_OUT:
            is_folder = key == "text_encoder" and _is_folder(value)
            kept[key] = shown_text_encoder(value) if is_folder else last_names(value)
            if kept[key] != value or is_folder:
                left_out[key] = kept[key]
    return {**kept, LEFT_OUT: left_out}


def shown_text_encoder(name: str) -> str:
    """A text encoder as pages for others name it: of a folder the last name."""
    return last_names(name, always=_is_folder(name))


def _is_folder(name: str) -> bool:
    return Path(name).expanduser().is_dir()


def shown_path(path: str | Path) -> str:
    """A file as pages for others name it: as it was given if that is from here, else by its last two parts."""
    path = Path(path)
    is_from_here = not path.is_absolute() and ".." not in path.parts and "~" not in path.parts[:1]
    return path.as_posix() if is_from_here else "/".join(path.parts[-2:]).lstrip("/")


def shown_command(words: Sequence[str]) -> str:
    """A command line without the places of its files; their last names stay."""
    shown = []
    for word in words:
        flag, equals, value = word.partition("=") if word.startswith("-") else ("", "", word)
        shown.append(f"{flag}{equals}{last_names(value)}")
    return shlex.join(shown)


def _names_a_file(value) -> bool:
    return any(part not in (None, "none") for part in (value if isinstance(value, list) else [value]))


def last_names(value, always: bool = False):
    """Paths in a setting by their last part; `always` for texts that do not look like a path too."""
    if isinstance(value, dict):
        return {key: last_names(part, always) for key, part in value.items()}
    if isinstance(value, list):
        return [last_names(part, always) for part in value]
    is_path = isinstance(value, str) and (always or LOCAL.search(value))
    return re.split(r"[\\/]", value.rstrip("\\/"))[-1] if is_path else value


def with_text_encoder(settings: dict, name: str) -> dict:
    """The settings with the text encoder by the name that this run has for it, where its folder's path was left out."""
    is_it = "text_encoder" in settings.get(LEFT_OUT, {}) and settings["text_encoder"] == Path(name).expanduser().name
    return {**settings, "text_encoder": name} if is_it else settings


def read_folder(folder: str | Path) -> tuple[dict[str, Tensor], dict]:
    """Tensors and metadata of such a folder by the names of a set's file, whose fit is not yet checked.

    Raises:
        InputError: the folder is none of these, a file of it is missing or damaged, or its lines are not its pairs.
    """
    folder = Path(folder)
    if (folder / LINES).exists() and not any((folder / name).exists() for name in (ABOUT, TENSORS)):
        return _read_captioned(folder)
    about = _read_about(folder)
    handle, _ = open_tensors(folder / TENSORS, TENSORS_KIND, (), ("text_syn",))
    tensors = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118, a handle is no dict
    training, settings = dict(about["training"]), dict(about["settings"])
    for name, flag in SCORED_BY.items():
        if name in training:
            settings[flag] = training.pop(name)
    for name in ("syn_lr_img", "syn_lr_txt"):
        tensors[name] = torch.tensor(training.pop(name), dtype=torch.float64)
    lines = _read_lines(folder)
    if len(lines) != len(tensors["text_syn"]):
        wrong = f"has {len(lines)} lines for {len(tensors['text_syn'])} texts of {TENSORS}"
        raise InputError(f"{folder / LINES} {wrong}; {ADVICE}")
    pictures = _picture_files(folder, lines)
    missing = next((path for path in pictures if not os.path.isfile(path)), None)
    if missing:
        raise InputError(f"picture {missing} of {LINES} is not there; {ADVICE}")
    if "pix_weights" in tensors:
        number = tensors["pix_weights"].shape[1:].numel()
        words = [_read_word(folder / WORDS / f"{i:06d}.jpg") for i in range(number)]
        tensors |= {"pix_words": torch.cat(words), "pix_sizes": torch.tensor([len(word) for word in words])}
    else:
        tensors["image_syn"] = normalize(_read_pictures(pictures), training["mean"], training["std"])
    rest = {key: about[key] for key in ("files", "scores") if key in about}
    if any("sentences" in line for line in lines):
        sentences = Sentences.of([_terms(folder, number, line) for number, line in enumerate(lines, 1)])
        tensors |= {"txt_rows": sentences.rows, "txt_weights": sentences.weights}
        rest["sentences"] = sentences.sentences
    return tensors, {**training, **rest, "captions": [line["text"] for line in lines], "settings": settings}


def _read_captioned(folder: Path) -> tuple[dict[str, Tensor], dict]:
    """Pairs of another program: without rates, and with texts [M, 1] of zeros until their captions are embedded."""
    lines = _read_lines(folder)
    pictures = _read_pictures(_picture_files(folder, lines), "give whole pictures of one size")
    tensors = {"image_syn": normalize(pictures, *UNIT), "text_syn": torch.zeros(len(lines), 1)}
    captions = [clean_caption(line["text"]) for line in lines]
    return tensors, {"captions": captions, "mean": UNIT[0], "std": UNIT[1], "settings": {"method": CAPTIONED}}


def _read_about(folder: Path) -> dict:
    """set.json, with all that training needs."""
    path = folder / ABOUT
    if not path.exists():
        best = folder / "best.safetensors"
        advice = f"give {best}" if best.exists() else "give a file, or a folder that evaluate.py --export writes now"
        raise InputError(f"set of pairs {folder} is a folder without {ABOUT}; {advice}")
    try:
        about = parse_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read ({error}); {ADVICE}") from error
    if not isinstance(about, dict) or about.get("kind") != KIND:
        raise InputError(f"{path} is not of a {KIND}; give a folder that evaluate.py --export wrote")
    problem = _problem(about)
    if problem:
        raise InputError(f"{path} {problem}; {ADVICE}")
    return about


def _problem(about: dict) -> str | None:
    training, settings = about.get("training"), about.get("settings")
    if not isinstance(training, dict) or not isinstance(settings, dict):
        return "has no training or no settings"
    lacking = [key for key in PARTS if key not in training]
    if lacking:
        return f"lacks {', '.join(lacking)}"
    by_encoder = training["rates"].values() if isinstance(training["rates"], dict) else [None]
    wanted = {"syn_lr_img": 0, "syn_lr_txt": 0, "alpha": 0, "mean": 3, "std": 3}
    numbers = [(name, training[name], size) for name, size in wanted.items()]
    for name, value, size in [*numbers, *(("rates", rates, 2) for rates in by_encoder)]:
        values = value if size and isinstance(value, list) else [value]
        if len(values) != (size or 1) or not all(map(is_number, values)):
            return f"has the {name} {value} instead of {size or 'one'} number{'s' if size else ''}"
    return None


def _read_lines(folder: Path) -> list[dict]:
    path = folder / LINES
    try:
        # Not splitlines: a caption may hold other characters that end a line.
        lines = [parse_json(line) for line in path.read_text(encoding="utf-8").split("\n") if line.strip()]
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read ({error}); {ADVICE}") from error
    for number, line in enumerate(lines, 1):
        if not isinstance(line, dict) or not all(isinstance(line.get(key), str) for key in ("file_name", "text")):
            raise InputError(f"{path} has no file_name and text in its pair {number}; {ADVICE}")
    return lines


def _picture_files(folder: Path, lines: list[dict]) -> list[Path]:
    """The files of the pairs' pictures. Raises InputError for one outside the folder: the lines may be a stranger's."""
    for number, line in enumerate(lines, 1):
        name = line["file_name"]
        parts = PurePosixPath(name.replace("\\", "/")).parts
        if not parts or {"..", "/"} & set(parts) or re.match("[A-Za-z]:", name) or not name.isprintable():
            raise InputError(
                f"{folder / LINES} has the picture {ascii(name)} in its pair {number}, which is no file of the folder; "
                f"{ADVICE}"
            )
    return [folder / line["file_name"] for line in lines]


def _terms(folder: Path, number: int, line: dict) -> list[tuple[str, float]]:
    """The sentences of a pair's text with their weights."""
    sentences, weights = line.get("sentences"), line.get("weights")
    if (
        not (isinstance(sentences, list) and isinstance(weights, list) and len(sentences) == len(weights))
        or not all(isinstance(sentence, str) for sentence in sentences)
        or not all(map(is_number, weights))
    ):
        raise InputError(f"{folder / LINES} has no sentences with a weight each in its pair {number}; {ADVICE}")
    return list(zip(sentences, weights, strict=True))


def _read_word(path: Path) -> Tensor:
    """A file's bytes, uint8 [bytes]."""
    try:
        return torch.frombuffer(bytearray(path.read_bytes()), dtype=torch.uint8)
    except (OSError, ValueError) as error:  # the second for an empty file
        raise InputError(f"picture {path} cannot be read ({error}); {ADVICE}") from error


def _read_pictures(paths: list[Path], advice: str = ADVICE) -> Tensor:
    """uint8 [M, 3, H, W]."""
    pictures = []
    for path in paths:
        try:
            with open_picture(path, among=len(paths)) as picture:
                pictures.append(np.array(picture.convert("RGB")))
        except (OSError, ValueError, SyntaxError) as error:  # the last for a damaged PNG
            raise InputError(f"picture {path} cannot be read ({error}); {advice}") from error
        if pictures[-1].shape != pictures[0].shape:
            sizes = " and ".join(f"{width} x {height}" for height, width, _ in (pictures[-1].shape, pictures[0].shape))
            raise InputError(f"picture {path} and the first one are {sizes} pixels large; {advice}")
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2) if pictures else torch.zeros(0, 3, 1, 1)
