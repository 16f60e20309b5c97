"""What keeps the parts of a set that was read, which a stranger may have made, from being M pairs."""

import math

import torch
from torch import Tensor

from data.forms import is_text
from networks.loss import LOSS_TYPES

PAIRS = "image_syn", "text_syn"
FLOATS = torch.float32, torch.float16, torch.bfloat16, torch.float64


def misfit(tensors: dict[str, Tensor], metadata: dict) -> str | None:
    """The first thing that is wrong, None if the parts are pairs with their rates, normalisation and settings.

    Args:
        tensors, metadata: by the names of a set's file. Similarity and sentences have checks of their own.
    """
    captions = metadata["captions"]
    if not (isinstance(captions, list) and all(map(is_text, captions))):
        return "captions is not a list of texts"
    return (
        _of_tensors(tensors, len(captions))
        or _of_rates(tensors, metadata.get("rates", {}))
        or _of_normalisation(metadata)
        or _of_words(metadata, len(captions))
        or next(
            (f"{name} has values that are not finite" for name in PAIRS if not tensors[name].isfinite().all()), None
        )
    )


def tensor_problem(tensor: Tensor) -> str | None:
    """What a torch file may hold that is no array of floats in memory; one that repeats its values can be huge."""
    if tensor.layout != torch.strided or tensor.device.type != "cpu":
        return f"is a {tensor.layout} tensor on {tensor.device.type}"
    if tensor.dtype not in FLOATS:
        return f"is {tensor.dtype} instead of floats"
    held = tensor.untyped_storage().nbytes()
    return f"has the shape {list(tensor.shape)} of {held:,} bytes" if held < tensor.nbytes else None


def is_number(value) -> bool:
    """Whether it is a finite int or float, such as fits into one."""
    try:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:
        return False


def _of_tensors(tensors: dict[str, Tensor], number: int) -> str | None:
    image_syn, text_syn = tensors["image_syn"], tensors["text_syn"]
    for name in PAIRS:
        if problem := tensor_problem(tensors[name]):
            return f"{name} {problem}"
    if image_syn.ndim != 4 or image_syn.shape[1] != 3 or 0 in image_syn.shape:
        return f"image_syn is {list(image_syn.shape)} instead of [M, 3, H, W]"
    if text_syn.ndim != 2 or 0 in text_syn.shape:
        return f"text_syn is {list(text_syn.shape)} instead of [M, D_text]"
    if not len(image_syn) == len(text_syn) == number:
        return f"it has {len(image_syn)} pictures, {len(text_syn)} texts and {number} captions"
    return None


def _of_rates(tensors: dict[str, Tensor], rates) -> str | None:
    for name in (name for name in ("syn_lr_img", "syn_lr_txt") if name in tensors):
        rate = tensors[name]
        if rate.numel() != 1 or tensor_problem(rate) or not 0 < rate.item() < math.inf:
            return f"{name} is {rate.tolist()} instead of one positive number"
    pairs = rates.values() if isinstance(rates, dict) else [None]
    for pair in pairs:
        if not (isinstance(pair, list) and len(pair) == 2 and all(is_number(rate) and rate > 0 for rate in pair)):
            return f"rates has {pair} instead of two positive numbers for each encoder"
    return None


def _of_normalisation(metadata: dict) -> str | None:
    for name in ("mean", "std"):
        values = metadata[name]
        numbers = isinstance(values, list) and all(map(is_number, values))
        if not numbers or len(values) != 3 or (name == "std" and min(values) <= 0):
            return f"{name} is {values} instead of three {'positive ' if name == 'std' else ''}numbers"
    return None


def _of_words(metadata: dict, number: int) -> str | None:
    """Of what the file says beside its tensors."""
    if not isinstance(metadata["settings"], dict):
        return "settings is not a table of names and values"
    files, scores = metadata.get("files", []), metadata.get("scores", [])
    if not (isinstance(files, list) and all(map(is_text, files))):
        return "files is not a list of names"
    if not (isinstance(scores, list) and all(map(is_number, scores))):
        return "scores is not a list of numbers"
    alpha, loss_type, phases = (
        metadata.get("alpha", 1.0),
        metadata.get("loss_type", "InfoNCE"),
        metadata.get("phases", 1),
    )
    if not is_number(alpha):
        return f"its alpha is {alpha} instead of a number"
    if not (isinstance(loss_type, str) and loss_type in LOSS_TYPES):
        return f"its loss_type is {loss_type} instead of one of {', '.join(LOSS_TYPES)}"
    if not (isinstance(phases, int) and 1 <= phases <= number):
        return f"its phases are {phases} for {number} pairs"
    return None
