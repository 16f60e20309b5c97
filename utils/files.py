"""Files that are written whole or not at all: safetensors with JSON metadata, torch, text; saving in a thread."""

import errno
import json
import os
import tempfile
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from data.errors import InputError
from data.forms import parse_json
from data.whole import clear_leftovers, replacing


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


UMASK = _umask()  # read once: to read it, it must be changed, which another thread could notice


def save_tensors(path: str | Path, tensors: dict[str, torch.Tensor], metadata: dict) -> None:
    """Writes `tensors` and JSON-able `metadata` to `path`, whole or not at all, and waits until the disk has them.

    Raises:
        InputError: the file cannot be written (disk full, no permission). What stood there before remains.
    """
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    try:
        with replacing(path, sync=True) as temporary:
            save_file(tensors, temporary, {key: json.dumps(value) for key, value in metadata.items()})
            temporary.chmod(0o666 & ~UMASK)  # safetensors makes files that only their owner can read
    except (OSError, SafetensorError) as error:
        raise InputError(f"cannot write {path} ({error}); free some space or choose another folder") from error


def tensor_bytes(tensor: torch.Tensor) -> np.ndarray:
    """The bytes of a tensor on any device, for a digest: uint8 [number of bytes]."""
    return tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()


def open_tensors(path: str | Path, kind: str, keys: tuple[str, ...] = (), tensors: tuple[str, ...] = ()):
    """Opens a safetensors file lazily and reads its metadata.

    Args:
        kind: what the file is, in its metadata and in errors.
        keys, tensors: what its metadata and the file must hold.

    Returns:
        (handle, metadata): `handle.get_tensor(name)` reads one tensor.

    Raises:
        InputError: the file is missing, damaged, not one of ours, or lacks a part.
    """
    try:
        handle = safe_open(path, "pt")
        metadata = {key: parse_json(value) for key, value in (handle.metadata() or {}).items()}
    except FileNotFoundError as error:
        raise InputError(f"{kind} {path} does not exist") from error
    except (OSError, SafetensorError, json.JSONDecodeError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"{kind} {path} is damaged or not a safetensors file ({reason}); make it again") from error
    if metadata.get("kind") != kind:
        raise InputError(f"{path} is not a {kind}: its metadata says {metadata.get('kind', 'nothing')}")
    lacking = [key for key in keys if key not in metadata] + sorted(set(tensors) - set(handle.keys()))
    if lacking:
        raise InputError(f"{kind} {path} lacks {', '.join(lacking)}; make it again")
    return handle, metadata


def save_text(path: str | Path, text: str) -> None:
    """Writes UTF-8 `text` to `path` whole or not at all.

    Raises:
        InputError: the file cannot be written. What stood there before remains.
    """
    try:
        with replacing(path) as temporary:
            temporary.write_text(text, encoding="utf-8")
    except OSError as error:
        raise InputError(f"cannot write {path} ({error.strerror}); free some space or give another file") from error


def check_can_write(path: str | Path) -> None:
    """Raises InputError if a file cannot be written at `path`, whose folder is made."""
    path = Path(path)
    try:
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, "it is a folder")
        path.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path.parent).close()
        clear_leftovers(path.parent)
    except OSError as error:
        raise InputError(f"cannot write {path} ({error.strerror}); give another file") from error


def save_torch(path: str | Path, stored) -> None:
    """Writes what `torch.load` reads to `path` whole or not at all.

    Raises:
        InputError: the file cannot be written. What stood there before remains.
    """
    try:
        with replacing(path) as temporary, temporary.open("wb") as file:
            torch.save(stored, file)
    except (OSError, RuntimeError) as error:  # torch's writer fails with the second on a full disk
        raise InputError(f"cannot write {path} ({error}); free some space or give another file") from error


class BackgroundSaver:
    """Runs one save at a time in a thread; as a context manager it waits for the last one.

    What a save raises is raised by the next `check`, `submit`, or at the end of the context.
    """

    def __init__(self):
        self.pool = ThreadPoolExecutor(1)
        self.saving: Future | None = None

    def __enter__(self):
        return self

    def __exit__(self, error_type, error, traceback) -> None:
        self.pool.shutdown(wait=True)  # also after an error or Ctrl-C: a save that has begun is finished
        if error_type is None:
            self.check()

    def check(self) -> None:
        """Raises what a finished save raised; does not wait."""
        if self.saving is not None and self.saving.done():
            self.saving.result()

    def submit(self, save: Callable, *args) -> None:
        """Calls save(*args) in the thread, after the save before has ended."""
        if self.saving is not None:
            self.saving.result()
        self.saving = self.pool.submit(save, *args)
