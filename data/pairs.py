"""Training pairs (one row per caption) and the retrieval set (one row per picture)."""

import hashlib
import math
import os
import random
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath

import numpy as np
import torch
from PIL import Image, ImageOps
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate

from data.annotations import Record
from data.errors import InputError
from data.transforms import eval_transform

DECODING_THREADS = min(16, os.cpu_count() or 1)
warnings.filterwarnings("ignore", message="Corrupt EXIF data")  # it names no picture
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)  # an error of `open_picture`
MOST_AT_ONCE = 10  # times PIL's limit on the pixels of a picture: what the pictures of a set may have together
READING = "upright 2"  # how `read_image` reads, for the keys of caches; to be changed when it does


def find_images(records: list[Record], image_root: str | Path) -> list[Path]:
    """The picture file of each record: N records -> N paths, all of which exist.

    `image_root` may be the folder the annotations' names start from, or already contain their first folders.

    Raises:
        InputError: no such folder, or pictures that are not there.
    """
    root = Path(image_root).expanduser().absolute()
    if not root.is_dir():
        raise InputError(f"no image folder {root}; give the folder of the pictures with --image_root")
    names = [PurePosixPath(record.image).parts for record in records]
    # The first picture found tells how many leading folders the root already contains.
    depths = ((parts, depth) for parts in names for depth in range(len(parts)))
    skipped = next((depth for parts, depth in depths if os.path.isfile(root.joinpath(*parts[depth:]))), 0)
    paths = [root.joinpath(*(parts[skipped:] or parts[-1:])) for parts in names]
    missing = [path for path in paths if not os.path.isfile(path)]
    if missing:
        raise InputError(
            f"{len(missing)} of {len(paths)} pictures are missing, the first is {missing[0]}; "
            "give their folder with --image_root"
        )
    return paths


def shared_pictures(paths: list[Path], others: list[Path]) -> list[tuple[Path, Path]]:
    """Pairs of one path of each list that are the same file or have the same bytes. Only files of one size are read."""
    sizes = {path: os.path.getsize(path) for path in {*paths, *others}}
    common = {sizes[path] for path in paths} & {sizes[path] for path in others}

    def digests(some):
        alike = dict.fromkeys(path for path in some if sizes[path] in common)
        with ThreadPoolExecutor(DECODING_THREADS) as pool:
            return dict(zip(alike, pool.map(_digest, alike), strict=True))

    first_with = {digest: path for path, digest in digests(paths).items()}
    return [(first_with[digest], path) for path, digest in digests(others).items() if digest in first_with]


def _digest(path: Path) -> bytes:
    try:
        return hashlib.sha1(path.read_bytes(), usedforsecurity=False).digest()
    except OSError:  # said when it is read as a picture
        return bytes(path)


def open_picture(file, among: int = 1) -> Image.Image:
    """A picture of a path or an open file, not yet decoded; `among` so many of its size that are held at once.

    Raises:
        OSError: it is none, or has more pixels than PIL's limit: a small file that would fill the memory.
    """
    try:
        image = Image.open(file)
        pixels = image.width * image.height
    except Image.DecompressionBombError:  # of twice the limit; of more than that it only warns
        pixels = math.inf
    if pixels > Image.MAX_IMAGE_PIXELS:
        raise OSError(f"more than {Image.MAX_IMAGE_PIXELS:,} pixels")
    pixels = among * image.width * image.height
    if pixels > MOST_AT_ONCE * Image.MAX_IMAGE_PIXELS:
        raise OSError(f"{among:,} pictures of its size have {pixels:,} pixels, too many for one set")
    return image


def read_image(path: str | Path) -> Image.Image:
    """Decodes a picture of any mode into PIL RGB, turned as its EXIF data say; transparent parts become white.

    Raises:
        InputError: the file is missing, broken or cut short.
    """
    try:
        with open_picture(path) as image:
            image.load()
            with suppress(Exception):  # broken EXIF data are no reason to leave a picture out
                ImageOps.exif_transpose(image, in_place=True)
            return _to_rgb(image)
    except Exception as error:  # decoders fail on broken files with almost any exception
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(
            f"cannot read picture {Path(path).absolute()} ({reason}); replace it or use --skip_broken"
        ) from error


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16 bits: Pillow's conversion clips instead of scaling
        return Image.fromarray((np.asarray(image) // 256).clip(0, 255).astype(np.uint8)).convert("RGB")
    if "transparency" in image.info or image.mode in ("RGBA", "LA", "PA"):
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def drop_unreadable(records: list[Record], paths: list[Path]) -> tuple[list[Record], list[Path], list[Path]]:
    """Decodes every picture once; returns the readable records and paths, and the paths left out."""

    def is_readable(path):
        try:
            read_image(path)
        except InputError:
            return False
        return True

    with ThreadPoolExecutor(DECODING_THREADS) as pool:
        readable = list(pool.map(is_readable, paths))
    kept = [i for i, good in enumerate(readable) if good]
    dropped = [path for path, good in zip(paths, readable, strict=True) if not good]
    return [records[i] for i in kept], [paths[i] for i in kept], dropped


class PairDataset(Dataset):
    """Training pairs, one row per caption: item `row` is (image uint8 [3, H, W], row).

    Args:
        transform: PIL picture -> uint8 [3, H, W].
        cache: decoded pictures by the index of their path; then `transform` gets uint8 [3, S, S] instead.

    Attributes:
        captions: the captions of all rows, the captions of one picture next to each other.
        row_to_image: index of each row's picture in `paths`, int64 [rows].
    """

    def __init__(self, records: list[Record], paths: list[Path], transform, cache=None):
        self.paths = paths
        self.cache = cache
        self.transform = transform
        self.captions, self.row_to_image = _flatten_captions(records)

    def __len__(self):
        return len(self.captions)

    def __getitem__(self, row: int) -> tuple[torch.Tensor, int]:
        index = self.row_to_image[row]
        image = read_image(self.paths[index]) if self.cache is None else self.cache[index]
        return self.transform(image), row


class PictureViews(Dataset):
    """Item v · P + i is (a view of picture i, uint8 [3, H, W]; the item's number), for P pictures and V views.

    Args:
        transform: PIL picture -> uint8 [3, H, W], random.
    """

    def __init__(self, paths: list[Path], transform, views: int):
        self.paths, self.transform, self.views = paths, transform, views

    def __len__(self):
        return self.views * len(self.paths)

    def __getitem__(self, item: int) -> tuple[torch.Tensor, int]:
        return self.transform(read_image(self.paths[item % len(self.paths)])), item


def _flatten_captions(records):
    captions = [caption for record in records for caption in record.captions]
    counts = torch.tensor([len(record.captions) for record in records], dtype=torch.long)
    return captions, torch.repeat_interleave(torch.arange(len(records)), counts)


def pair_loader(
    dataset: PairDataset,
    batch_size: int,
    seed: int,
    num_workers: int,
    drop_last: bool = False,
    batches: range | None = None,
) -> "PairLoader":
    """Shuffled batches (images uint8 [B, 3, H, W], rows int64 [B]), in another order each epoch.

    Order and augmentation depend on `seed` and on how many epochs came before, not on `num_workers`;
    the process's own random state stays as it is. Iterating raises InputError at an unreadable picture.
    With `batches`, only those of these numbers in an epoch's order.
    """
    rows = None if batches is None else slice(batches.start * batch_size, batches.stop * batch_size)
    return PairLoader(dataset, batch_size, seed, num_workers, drop_last, rows)


class PairLoader:
    """See `pair_loader`. `epoch` is the number of the next epoch, from 0; set it to resume."""

    def __init__(self, dataset, batch_size, seed, num_workers, drop_last, rows):
        self.epoch = 0
        self.sampler = _SeededSampler(len(dataset), seed, rows or slice(None))
        self.loader = DataLoader(
            _SeededItems(dataset),
            batch_size,
            sampler=self.sampler,
            num_workers=num_workers,
            collate_fn=_collate,
            drop_last=drop_last,
            pin_memory=torch.cuda.is_available(),
            persistent_workers=num_workers > 0,
            generator=torch.Generator(),  # otherwise the loader draws from the process's own
        )

    def __len__(self):
        return len(self.loader)

    def __iter__(self):
        self.sampler.epoch = self.epoch
        self.epoch += 1
        for batch in self.loader:
            if isinstance(batch, InputError):
                # A new one: raising `batch` itself would tie it, this frame and the workers into a cycle.
                raise InputError(*batch.args)
            yield batch


class _SeededSampler(Sampler):
    """Yields (row, seed of its augmentation), so that it does not matter which worker takes the row."""

    def __init__(self, rows: int, seed: int, part: slice):
        self.rows = rows
        self.seed = seed
        self.part = part  # of the order
        self.epoch = 0

    def __len__(self):
        return len(range(self.rows)[self.part])

    def __iter__(self):
        generator = epoch_generator(self.seed, self.epoch)
        order = torch.randperm(self.rows, generator=generator)
        seeds = torch.randint(2**32, (self.rows,), generator=generator)
        return zip(order[self.part].tolist(), seeds[self.part].tolist(), strict=True)


def epoch_generator(seed: int, epoch: int) -> torch.Generator:
    """Of an epoch's order; seed 0, epoch 1 and seed 1, epoch 0 have nothing in common, as a text seeds by a hash."""
    return torch.Generator().manual_seed(random.Random(f"{seed} {epoch}").getrandbits(63))


class _SeededItems(Dataset):
    """Items by (row, seed). An InputError is returned: raised in a worker, it would become a traceback."""

    def __init__(self, dataset):
        self.dataset = dataset

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, key):
        row, seed = key
        try:
            with _fixed_randomness(seed):
                return self.dataset[row]
        except InputError as error:
            return error


def _collate(items):
    error = next((item for item in items if isinstance(item, InputError)), None)
    return error or tuple(default_collate(items))


@contextmanager
def _fixed_randomness(seed):
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    random.seed(seed)
    np.random.seed(seed)
    torch.default_generator.manual_seed(seed)  # torch.manual_seed would reseed the GPU as well
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])


@dataclass
class RetrievalSet:
    """N pictures, the captions of all of them, and each caption's picture int64 [C].

    `pictures` are uint8 [N, 3, H, W], or files to be read at `image_size`. `image_embed` [N, D_enc] is what a frozen
    image encoder gives for them, where that is known: then no picture need be read.
    """

    pictures: torch.Tensor | list[Path]
    captions: list[str]
    caption_to_image: torch.Tensor
    image_size: int | None = None
    image_embed: torch.Tensor | None = None

    @cached_property
    def images(self) -> torch.Tensor:
        """All pictures, uint8 [N, 3, H, W]; files are read once. Raises InputError at an unreadable one."""
        return self.pictures if isinstance(self.pictures, torch.Tensor) else load_images(self.pictures, self.image_size)

    def some_images(self, numbers: list[int]) -> torch.Tensor:
        """The pictures of these numbers alone, as `images`."""
        if isinstance(self.pictures, torch.Tensor):
            return self.pictures[numbers]
        return load_images([self.pictures[number] for number in numbers], self.image_size)


def retrieval_set(records: list[Record], paths: list[Path], image_size: int) -> RetrievalSet:
    """A whole split; no picture is read yet."""
    return RetrievalSet(paths, *_flatten_captions(records), image_size)


def load_images(paths: list[Path], image_size: int) -> torch.Tensor:
    """N picture files -> uint8 [N, 3, image_size, image_size], test transform. Raises InputError."""
    transform = eval_transform(image_size)
    images = torch.empty(len(paths), 3, image_size, image_size, dtype=torch.uint8)

    def load(i):
        images[i] = transform(read_image(paths[i]))

    with ThreadPoolExecutor(DECODING_THREADS) as pool:
        list(pool.map(load, range(len(paths))))
    return images
