"""The splits of a data set with their captions embedded, and the batches that experts train on."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from data.annotations import Record, read_split
from data.augment import Augment, cached_side
from data.caches.captions import embed_captions
from data.caches.pictures import cache_images
from data.demo import make_demo
from data.errors import InputError
from data.pairs import (
    PairDataset,
    RetrievalSet,
    drop_unreadable,
    find_images,
    pair_loader,
    retrieval_set,
    shared_pictures,
)
from data.transforms import train_transform
from networks.clip_model import ModelFactory
from networks.text_encoder import TextEncoder
from utils import ranks
from utils.scoring import EmbedLoader, check_num_queries, embed_views
from utils.setup.networks import find_device, make_factory


@dataclass(frozen=True)
class Data:
    """The splits of a data set as a script reads them, and fresh models for them.

    Attributes:
        records: of the train split's pictures.
        real: the train split's pairs, a row per caption.
        real_embed: the embeddings of their captions [rows, D_text].
        scored: by split, (RetrievalSet, text_embed [C, D_text]).
        factory: gives fresh models.
    """

    records: list[Record]
    real: PairDataset
    real_embed: torch.Tensor
    scored: dict[str, tuple[RetrievalSet, torch.Tensor]]
    factory: ModelFactory


def open_data(args, scored: Sequence[str] = (), num_queries: int = 0) -> Data:
    """Finds the splits, embeds their captions once and builds the encoders; no picture is read yet.

    Args:
        scored: splits beside train: those that recall is measured on.
        num_queries: pairs that are made from the train split.

    Raises:
        InputError: files or pictures are missing, or the train split has fewer than `num_queries` pictures.
    """
    with ranks.first_goes_first():  # what it downloads and caches, the others find
        train, *others = (find_split(args, split) for split in ("train", *scored))
        warn_of_shared_pictures(train, *others)
        records, paths = train
        check_num_queries(num_queries, len(paths))
        text_encoder = make_text_encoder(args)
        factory = make_factory(args, text_encoder.width)
        real, real_embed = real_pairs(args, train, text_encoder)
        retrieval = [retrieval_pairs(args, split, text_encoder) for split in others]
    return Data(records, real, real_embed, dict(zip(scored, retrieval, strict=True)), factory)


def find_split(args, split: str) -> tuple[list[Record], list[Path]]:
    """The records of a split and their picture files, without opening a picture (but see --skip_broken)."""
    records = read_records(args, split)
    paths = find_images(records, args.image_root)
    if args.skip_broken:
        records, paths, dropped = drop_unreadable(records, paths)
        if dropped:
            print(f"warning: left out {len(dropped)} unreadable pictures of {split}, the first is {dropped[0]}")
        if not records:
            raise InputError(f"no readable picture in {split}; check --image_root")
    return records, paths


def read_records(args, split: str) -> list[Record]:
    """The records of a split, whether their pictures are there or not."""
    if args.dataset == "demo":
        make_demo(Path(args.ann_root))
    return read_split(args.dataset, split, args.ann_root, args.split_seed)


def warn_of_shared_pictures(train: tuple, *others: tuple) -> None:
    """Says in one line if pictures of the train split are in other splits too; all as of `find_split`."""
    shared = shared_pictures(train[1], [path for _, paths in others for path in paths])
    if shared:
        examples = ", ".join(f"{path}" if path == other else f"{path} as {other}" for path, other in shared[:2])
        print(
            f"warning: the pictures of train and those that are scored have {len(shared)} in common, by file or by "
            f"bytes: {examples}"
        )


def make_text_encoder(args) -> TextEncoder:
    return TextEncoder(args.text_encoder, args.text_pooling, args.text_pretrained, find_device(args))


def real_pairs(args, split, text_encoder) -> tuple[PairDataset, torch.Tensor]:
    """Pairs, one row per caption, and the captions' embeddings [rows, D_text]; `split` from `find_split`."""
    records, paths = split
    real = PairDataset(records, paths, train_transform(args.image_size, args.no_aug))
    return real, embed_captions(real.captions, text_encoder, args.cache_dir)


def expert_loader(args, real: PairDataset, factory: ModelFactory):
    """(loader of an expert's batches by its seed, what augments them on the device if anything).

    Where the image encoder is frozen, the batches hold its output for the pictures, computed once.
    """
    if factory.image_trainable:
        if args.aug_views:
            raise InputError("--aug_views is for a frozen image encoder; drop it or give --image_trainable False")
        augment = use_image_cache(real, args) if args.cache_images else None
        return lambda seed: pair_loader(real, args.batch_size_train, seed, args.num_workers), augment
    if args.cache_images:
        raise InputError("--cache_images has no use where the image encoder is frozen: its output is cached; drop it")
    image_embed = embed_views(
        real.paths,
        factory.encoder,
        image_size=args.image_size,
        views=0 if args.no_aug else args.aug_views,
        batch_size=args.batch_size_test,
        num_workers=args.num_workers,
        device=factory.device,
        cache_dir=args.cache_dir,
    )
    return lambda seed: EmbedLoader(image_embed, real.row_to_image, args.batch_size_train, seed), None


def use_image_cache(real: PairDataset, args) -> Augment | None:
    """Lets the pairs read their pictures from the cache, made if need be; returns what augments on the device, if any.

    On a CPU the loader's workers augment. See `data.caches.pictures` for the errors.
    """
    with ranks.first_goes_first():
        real.cache = cache_images(real.paths, cached_side(args.image_size, args.no_aug), args.cache_dir)
    augment = None if args.no_aug else Augment(args.image_size)
    on_device = augment is not None and augments_on(find_device(args))
    real.transform = _as_it_is if augment is None or on_device else augment.one
    return augment if on_device else None


def augments_on(device: torch.device) -> bool:
    return device.type == "cuda"


def _as_it_is(image):
    return image


def retrieval_pairs(args, split, text_encoder) -> tuple[RetrievalSet, torch.Tensor]:
    """A retrieval set and its captions' embeddings [C, D_text]; `split` from `find_split`."""
    records, paths = split
    whole = retrieval_set(records, paths, args.image_size)
    return whole, embed_captions(whole.captions, text_encoder, args.cache_dir)
