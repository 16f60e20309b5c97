"""Features of pretrained image encoders, cached like the caption embeddings: for coresets and frozen towers.

Ranks share the work by whole batches, so the numbers are those of one process.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from data.caches.pictures import file_marks
from data.errors import InputError
from data.pairs import READING, PictureViews, epoch_generator, load_images, pair_loader
from data.transforms import normalize, train_transform
from utils import ranks
from utils.files import open_tensors, save_tensors, tensor_bytes

KIND = "image features"
BLOCK = 4096  # pictures whose features are looked through at a time
VIEW_SEED = 0  # of the augmented views


def embed_images(paths: list[Path], encoder, image_size: int, batch_size: int, device, cache_dir) -> Tensor:
    """Pooled features of each picture under the test transform: P files -> float32 [P, D_img] on the CPU.

    Read from `cache_dir` if the same encoder saw the same files before, by weights, names, sizes and times.
    A damaged cache file is made anew and a folder that cannot be written to is no error: one printed line.
    """
    path = feature_cache_path(paths, encoder, image_size, 0, cache_dir)
    return _cached(path, lambda: _encode(paths, encoder, image_size, batch_size, device), (len(paths), encoder.width))


def embedded_once(retrieval, factory, batch_size: int, cache_dir):
    """(RetrievalSet, text_embed), the set with its pictures read, or `image_embed` if the image encoder is frozen.

    Features are cached as those of `embed_images`; the pictures must be files. Raises InputError at an unreadable one.
    """
    whole, text_embed = retrieval
    if factory.image_trainable:
        _ = whole.images  # read now: an unreadable one must not end a run when its split is scored at last
        return retrieval
    image_embed = embed_images(
        whole.pictures,
        factory.encoder,
        image_size=whole.image_size,
        batch_size=batch_size,
        device=factory.device,
        cache_dir=cache_dir,
    )
    return replace(whole, image_embed=image_embed.to(factory.device)), text_embed


def embed_views(
    paths: list[Path], encoder, image_size: int, views: int, batch_size: int, num_workers: int, device, cache_dir
) -> Tensor:
    """Pooled features of `views` augmented views of each picture: P files -> float32 [V, P, D_img] on the CPU.

    Without views, one under the test transform. Cached as those of `embed_images`.
    """
    if not views:
        return embed_images(paths, encoder, image_size, batch_size, device, cache_dir)[None]

    def make():
        size = 4 * views * len(paths) * encoder.width / 1e9
        print(f"caching features of {views} views of {len(paths)} pictures: {size:.2f} GB in {cache_dir}")
        dataset = PictureViews(paths, train_transform(image_size), views)
        return _encode_views(dataset, encoder, batch_size, num_workers, device).view(views, len(paths), -1)

    path = feature_cache_path(paths, encoder, image_size, views, cache_dir)
    return _cached(path, make, (views, len(paths), encoder.width))


def feature_cache_path(paths: list[Path], encoder, image_size: int, views: int, cache_dir: str | Path) -> Path:
    """The file of `embed_views`, without views that of `embed_images`, whether it is there or not."""
    rule = f"{image_size} {views} views, seed {VIEW_SEED}" if views else f"{image_size}"
    return Path(cache_dir).expanduser() / f"image_{_cache_key(rule, paths, encoder)}.safetensors"


def _cached(path: Path, make: Callable, shape: tuple) -> Tensor:
    if ranks.gather(path.exists())[0]:
        try:
            return _checked(path, open_tensors(path, KIND, tensors=("image_embed",))[0], shape)
        except InputError as error:
            print(f"making the image features anew: {error}")
    image_embed = make()
    ranks.add_up([image_embed])
    try:
        if ranks.is_first():
            save_tensors(path, {"image_embed": image_embed}, {"kind": KIND})
    except InputError as error:
        print(f"warning: image features not cached: {error}")
    return image_embed


def _checked(path: Path, handle, shape: tuple) -> Tensor:
    """The features of a cache file. Raises InputError if they are not finite floats of `shape`."""
    image_embed = handle.get_tensor("image_embed")
    if image_embed.dtype != torch.float32 or image_embed.shape != shape or not _all_finite(image_embed):
        found = f"{image_embed.dtype} {list(image_embed.shape)}"
        raise InputError(f"{path} holds {found} instead of finite torch.float32 {list(shape)}")
    return image_embed


def _all_finite(image_embed: Tensor) -> bool:
    # In blocks: of COCO's pictures at once the check would take twice the memory of the features.
    return all(rows.isfinite().all() for rows in image_embed.split(BLOCK, dim=-2))


@torch.no_grad()
def _encode(paths, encoder, image_size, batch_size, device) -> Tensor:
    """Features [P, D_img], 0 for pictures that fall to other ranks."""
    was_training = encoder.training
    encoder = encoder.to(device, memory_format=torch.channels_last).eval()
    image_embed = torch.zeros(len(paths), encoder.width)
    own = ranks.share_of(-(-len(paths) // batch_size))
    batches = [slice(batch * batch_size, (batch + 1) * batch_size) for batch in own]
    pictures = read_ahead(lambda rows: load_images(paths[rows], image_size), batches)
    bar = tqdm(batches, desc="image features", leave=False, disable=None, position=ranks.rank())
    for rows, images in zip(bar, pictures, strict=True):
        image_embed[rows] = encoder(normalize(images.to(device), encoder.mean, encoder.std)).float().cpu()
    encoder.train(was_training)
    return image_embed


def read_ahead(read: Callable, items: Sequence) -> Iterator:
    """read(item) of each, the next one read in another thread while the last is worked on."""
    with ThreadPoolExecutor(1) as reader:
        coming = None
        for item in items:
            ready, coming = coming, reader.submit(read, item)
            if ready is not None:
                yield ready.result()
        if coming is not None:
            yield coming.result()


@torch.no_grad()
def _encode_views(dataset: PictureViews, encoder, batch_size, num_workers, device) -> Tensor:
    """Features [V * P, D_img], 0 for views that fall to other ranks."""
    encoder = encoder.to(device, memory_format=torch.channels_last).eval()
    image_embed = torch.zeros(len(dataset), encoder.width)
    own = ranks.share_of(-(-len(dataset) // batch_size))
    loader = pair_loader(dataset, batch_size, VIEW_SEED, num_workers, batches=own)
    for images, items in tqdm(loader, desc="features of views", leave=False, disable=None, position=ranks.rank()):
        pixels = normalize(images.to(device), encoder.mean, encoder.std)
        image_embed[items] = encoder(pixels.contiguous(memory_format=torch.channels_last)).float().cpu()
    return image_embed


class EmbedLoader:
    """Shuffled batches (image_embed [B, D], rows int64 [B]) of features, as `pair_loader` gives pictures.

    Each epoch has another order and draws a view of each row's picture anew, by `seed` and the epoch alone.

    Args:
        image_embed: [V, P, D], see `embed_views`.
        row_to_image: int64 [rows].
    """

    def __init__(self, image_embed: Tensor, row_to_image: Tensor, batch_size: int, seed: int):
        self.image_embed, self.row_to_image = image_embed, row_to_image
        self.batch_size, self.seed, self.epoch = batch_size, seed, 0

    def __len__(self):
        return -(-len(self.row_to_image) // self.batch_size)

    def __iter__(self):
        generator = epoch_generator(self.seed, self.epoch)
        self.epoch += 1
        order = torch.randperm(len(self.row_to_image), generator=generator)
        views = torch.randint(len(self.image_embed), (len(order),), generator=generator)
        for rows, view in zip(order.split(self.batch_size), views.split(self.batch_size), strict=True):
            yield self.image_embed[view, self.row_to_image[rows]], rows


def _cache_key(rule: str, paths, encoder) -> str:
    digest = hashlib.sha256(f"{rule} {READING} {encoder.mean} {encoder.std} {encoder}".encode())
    for name, value in sorted(encoder.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor_bytes(value))
    digest.update(file_marks(paths))
    return digest.hexdigest()
