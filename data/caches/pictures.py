"""Training pictures decoded once: one memory-mapped file of uint8 squares."""

import errno
import hashlib
import shutil
from pathlib import Path

import numpy as np
import torch

from data.errors import InputError
from data.pairs import READING, load_images
from data.whole import replacing

BLOCK = 256  # pictures in memory at once while the file is made
RULE = "bicubic square 1"  # how a picture that is read becomes a square; to be changed when `load_images` does


class ImageCache:
    """Pictures by index, uint8 [3, side, side], read from a memory-mapped file of [P, 3, side, side]."""

    def __init__(self, path: Path):
        self.path = path
        self.images = np.load(path, mmap_mode="r")

    def __reduce__(self):  # a loader's worker opens the file itself instead of being sent the pictures
        return ImageCache, (self.path,)

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.from_numpy(self.images[index].copy())


def cache_images(paths: list[Path], side: int, cache_dir: str | Path) -> ImageCache:
    """Opens the cache of these pictures, and makes it first where there is none or a damaged one.

    P pictures take P * 3 * side² bytes, stated in a line before they are written. The file is named after the
    pictures' names, sizes and times, the side and the resize rule: other pictures get another file.

    Raises:
        InputError: an unreadable picture, too little room, or a folder that cannot be written to; no file is left.
    """
    shape = len(paths), 3, side, side
    path = image_cache_path(paths, side, cache_dir)
    if path.exists():
        try:
            cache = ImageCache(path)
            if cache.images.shape != shape or cache.images.dtype != np.uint8:
                raise ValueError(f"{cache.images.dtype} {cache.images.shape} instead of uint8 {shape}")
            return cache
        except (OSError, ValueError, EOFError) as error:
            print(f"making the picture cache anew: cannot use {path} ({' '.join(str(error).split())})")
    try:
        with replacing(path) as temporary:
            _check_room(path, shape)
            _write(temporary, paths, shape)
    except OSError as error:
        raise InputError(f"cannot write {path} ({error}); give another --cache_dir or no --cache_images") from error
    return ImageCache(path)


def image_cache_path(paths: list[Path], side: int, cache_dir: str | Path) -> Path:
    """The file of `cache_images`, whether it is there or not."""
    return Path(cache_dir).expanduser() / f"pictures_{_cache_key(paths, side)}.npy"


def _check_room(path: Path, shape) -> None:
    needed, free = int(np.prod(shape, dtype=np.int64)), shutil.disk_usage(path.parent).free
    if needed > free:
        raise OSError(errno.ENOSPC, f"{needed / 1e9:.2f} GB needed, {free / 1e9:.2f} GB free")
    print(f"caching {shape[0]} pictures of {shape[2]} px: {needed / 1e9:.2f} GB in {path}")


def _write(path: Path, paths, shape) -> None:
    with path.open("wb") as file:  # not memory-mapped: a full disk would be a signal there, here it is an OSError
        header = {"descr": "|u1", "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, header)
        for first in range(0, len(paths), BLOCK):
            file.write(load_images(paths[first : first + BLOCK], shape[2]).numpy().data)


def _cache_key(paths, side: int) -> str:
    digest = hashlib.sha256(f"{RULE} {READING} {side}".encode())
    digest.update(file_marks(paths))
    return digest.hexdigest()


def file_marks(paths: list[Path]) -> bytes:
    """Names, sizes and times of files, for the keys of caches: other pictures have another key."""
    statuses = ((path, path.stat()) for path in paths)
    return "".join(f"{path}\n{status.st_size} {status.st_mtime_ns}\n" for path, status in statuses).encode()
