"""The splits of a run, and the caches that it writes: counted, and neither read nor made."""

from dataclasses import dataclass
from pathlib import Path

from data.augment import cached_side
from data.caches.captions import text_cache_path
from data.caches.pictures import image_cache_path
from data.pairs import PairDataset
from networks.clip_model import ModelFactory
from networks.text_encoder import TextEncoder
from utils.scoring import check_num_queries, feature_cache_path
from utils.setup.backbones import args_of_encoders
from utils.setup.data import find_split, make_text_encoder
from utils.setup.networks import make_factory


@dataclass(frozen=True)
class Cache:
    """A file in --cache_dir: `bytes` of numbers, beside which its head is nothing.

    `rows` are those that are encoded to make it, texts or pictures; 0 where nothing is encoded.
    """

    name: str
    path: Path
    bytes: int
    rows: int


class Planned:
    """What a run reads, opened as the run opens it, without encoding anything.

    Attributes:
        pairs: by split, a row per caption; "train" is the first.
        text_encoder: of the captions.
        factories: by the name of the image encoder.

    Raises:
        InputError: as `open_data`.
    """

    def __init__(self, args, scored: tuple[str, ...] = (), num_queries: int = 0):
        self.args = args
        first, *_ = every = args_of_encoders(args)
        splits = {split: find_split(first, split) for split in ("train", *scored)}
        check_num_queries(num_queries, len(splits["train"][1]))
        self.pairs = {split: PairDataset(records, paths, None) for split, (records, paths) in splits.items()}
        self.text_encoder: TextEncoder = make_text_encoder(first)
        width = self.text_encoder.width
        self.factories: dict[str, ModelFactory] = {own.image_encoder: make_factory(own, width) for own in every}

    def captions(self, split: str) -> Cache:
        captions = self.pairs[split].captions
        distinct = len(set(captions))
        path = text_cache_path(captions, self.text_encoder, self.args.cache_dir)
        return Cache(f"captions of {split}", path, 4 * distinct * self.text_encoder.width, distinct)

    def features(self, split: str, name: str, views: int = 0) -> Cache:
        """Of the image encoder `name`, of its views if there are any."""
        encoder, paths = self.factories[name].encoder, self.pairs[split].paths
        path = feature_cache_path(paths, encoder, self.args.image_size, views, self.args.cache_dir)
        rows = max(views, 1) * len(paths)
        shown = f"{views} views of " if views else ""
        return Cache(f"features of {shown}{split} by {name}", path, 4 * rows * encoder.width, rows)

    def pictures(self) -> Cache:
        """Of --cache_images."""
        side, paths = cached_side(self.args.image_size, self.args.no_aug), self.pairs["train"].paths
        path = image_cache_path(paths, side, self.args.cache_dir)
        return Cache("pictures of train", path, len(paths) * 3 * side**2, 0)

    def texts_held(self) -> list[int]:
        """Bytes of the embeddings of all captions in memory, of each split; the first is train."""
        return [4 * len(pairs) * self.text_encoder.width for pairs in self.pairs.values()]
