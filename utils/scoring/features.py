"""Features of the pretrained encoders that herding and k-center work on, cached like the caption embeddings."""

import hashlib
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from data.errors import InputError
from data.pairs import load_images
from data.transforms import normalize
from utils.files import open_tensors, save_tensors

KIND = "image features"
BLOCK = 512  # pictures in memory at once


def pair_features(kind: str, image_embed: Tensor | None, text_embed: Tensor | None, row_to_image: Tensor) -> Tensor:
    """Features of the pairs, one row per caption.

    Args:
        kind: "image" [N, D_img], "text" [N, D_text], or "joint" [N, D_img + D_text], both next to each other.
            Each modality is L2-normalised by itself, so all rows have one norm and both weigh the same.
        image_embed: [P, D_img], one row per picture; not needed for "text".
        text_embed: [N, D_text]; not needed for "image".
        row_to_image: [N].

    Raises:
        InputError: an encoder gave features that are not finite.
    """
    parts = []
    if kind in ("image", "joint"):
        parts.append(F.normalize(_finite(image_embed, "image"), dim=-1)[row_to_image])
    if kind in ("text", "joint"):
        parts.append(F.normalize(_finite(text_embed, "text"), dim=-1))
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def _finite(embed: Tensor, name: str) -> Tensor:
    if not torch.isfinite(embed).all():
        raise InputError(f"the {name} encoder gives features that are not finite; use another encoder or --features")
    return embed


def embed_images(paths: list[Path], encoder, image_size: int, batch_size: int, device, cache_dir) -> Tensor:
    """Pooled features of each picture under the test transform: P files -> float32 [P, D_img] on the CPU.

    Read from `cache_dir` if the same encoder saw the same files before, by weights, names, sizes and times.
    A damaged cache file is made anew and a folder that cannot be written to is no error: one printed line.
    """
    key = _cache_key(paths, encoder, image_size)
    path = Path(cache_dir).expanduser() / f"image_{key}.safetensors"
    if path.exists():
        try:
            return open_tensors(path, KIND, tensors=("image_embed",))[0].get_tensor("image_embed")
        except InputError as error:
            print(f"making the image features anew: {error}")
    image_embed = _encode(paths, encoder, image_size, batch_size, device)
    try:
        save_tensors(path, {"image_embed": image_embed}, {"kind": KIND})
    except InputError as error:
        print(f"warning: image features not cached: {error}")
    return image_embed


@torch.no_grad()
def _encode(paths, encoder, image_size, batch_size, device) -> Tensor:
    encoder = encoder.to(device, memory_format=torch.channels_last).eval()
    image_embed = torch.empty(len(paths), encoder.width)
    for first in tqdm(range(0, len(paths), BLOCK), desc="image features", leave=False, disable=None):
        images = load_images(paths[first : first + BLOCK], image_size)  # [B, 3, H, W]
        features = [
            encoder(normalize(batch.to(device), encoder.mean, encoder.std)).float().cpu()
            for batch in images.split(batch_size)
        ]
        image_embed[first : first + len(images)] = torch.cat(features)
    return image_embed


def _cache_key(paths, encoder, image_size: int) -> str:
    digest = hashlib.sha256(f"{image_size} {encoder.mean} {encoder.std} {encoder}".encode())
    for name, value in sorted(encoder.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    for path in paths:
        status = path.stat()
        digest.update(f"{path}\n{status.st_size} {status.st_mtime_ns}\n".encode())
    return digest.hexdigest()
