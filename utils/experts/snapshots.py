"""How an expert's snapshots are stored: the first in full, later ones in full or as small differences to the first."""

import hashlib
import math
from pathlib import Path

import torch

from data.errors import InputError
from utils.files import open_tensors, save_tensors, tensor_bytes

TYPES = ("fp16", "fp32")
FLOATS = "F16", "BF16", "F32", "F64"  # as safetensors names them
START_KIND = "start of the image tower"
TOP, LEAST = 15, -126  # a scaled difference is below 2**15, fp16 ends at 2**16; fp32 scales are normal from 2**-126


def pack_snapshots(
    snapshots: dict[int, dict[str, torch.Tensor]], snapshot_type: str
) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    """Tensors to store, by "epoch/name", and the scales of those among them that are differences.

    With "fp16" a float32 parameter after epoch 0 becomes fp16((θ_e - θ_0) / scale): 11 significant bits of the
    difference, in half the bytes. The scale is a power of two, one for each tensor. `unpack` is the inverse.
    """
    tensors, scales = {}, {}
    for epoch, snapshot in snapshots.items():
        for name, value in snapshot.items():
            key = f"{epoch}/{name}"
            tensors[key] = value
            if snapshot_type == "fp16" and epoch > 0 and value.dtype == torch.float32:
                difference = value - snapshots[0][name]
                scales[key] = _scale(difference)
                tensors[key] = (difference / scales[key]).half()
    return tensors, scales


def unpack(first: torch.Tensor, stored: torch.Tensor, scale: float) -> torch.Tensor:
    """The parameter of which `stored` is the scaled difference to `first`, float32."""
    return torch.add(first, stored.float(), alpha=scale)


def misfit(handles: dict, scales) -> str | None:
    """What keeps an expert's tensors, by "epoch/name", and their scales from being its snapshots; reads no tensor."""
    by_epoch = {}
    for key, handle in handles.items():
        epoch, _, name = key.partition("/")
        if not (epoch.isdecimal() and name):
            return f"has a tensor {key} that is of no epoch"
        part = handle.get_slice(key)
        if part.get_dtype() not in FLOATS:
            return f"has {key} of {part.get_dtype()} instead of floats"
        by_epoch.setdefault(int(epoch), {})[name] = part.get_shape()
    first = by_epoch.get(0, {})
    for epoch, shapes in sorted(by_epoch.items()):
        if differing := sorted(name for name in {*first, *shapes} if first.get(name) != shapes.get(name)):
            return f"has another {differing[0]} after epoch {epoch} than before training"
    if not isinstance(scales, dict) or not all(isinstance(scale, float) for scale in scales.values()):
        return "has scales that are not numbers"
    return None if set(scales) <= set(handles) else "has scales of tensors that it lacks"


def _scale(difference: torch.Tensor) -> float:
    largest = difference.abs().max().item() if difference.numel() else 0.0
    return 2.0 ** max(math.frexp(largest)[1] - TOP, LEAST)


def start_path(folder: Path, digest: str) -> Path:
    return folder / f"start_{digest[:16]}.safetensors"


def save_start(folder: Path, tensors: dict[str, torch.Tensor]) -> str:
    """Stores what experts of a folder start from in common, once; returns its hex SHA-256.

    Raises:
        InputError: the file cannot be written.
    """
    digest = _digest(tensors)
    path = start_path(folder, digest)
    try:
        is_there = open_tensors(path, START_KIND)[1].get("sha256") == digest
    except InputError:  # missing or damaged
        is_there = False
    if not is_there:
        save_tensors(path, tensors, {"kind": START_KIND, "sha256": digest})
    return digest


def open_start(expert: Path, digest: str):
    """Opens, lazily, what `save_start` stored beside `expert`.

    Raises:
        InputError: the file is missing, damaged or another one.
    """
    path = start_path(expert.parent, digest)
    if not path.exists():
        raise InputError(
            f"expert {expert} needs {path.name}, which is not beside it; copy it from where it was trained"
        )
    handle, metadata = open_tensors(path, START_KIND)
    if metadata.get("sha256") != digest:
        raise InputError(f"{path} is not what expert {expert} started from; copy it from where the expert was trained")
    return handle


def _digest(tensors: dict[str, torch.Tensor]) -> str:
    digest = hashlib.sha256()
    for name, value in sorted(tensors.items()):
        digest.update(f"{name} {tuple(value.shape)} {value.dtype} ".encode())
        digest.update(tensor_bytes(value))
    return digest.hexdigest()
