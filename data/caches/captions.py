"""Caption embeddings on disk, keyed by encoder and captions."""

import hashlib
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from data.whole import clear_leftovers, replacing


def embed_captions(captions: list[str], encoder, cache_dir: str | Path | None) -> torch.Tensor:
    """Embeds captions, each distinct one once: N strings -> float32 [N, D] on the CPU.

    Args:
        captions: any texts; the same one may come several times.
        encoder: has `fingerprint() -> str` and `encode(list of U strings) -> float32 [U, D]`.
        cache_dir: folder of the cache files; None for no cache.

    A damaged cache file is made anew and a folder that cannot be written to is no error: one printed line.
    """
    unique = list(dict.fromkeys(captions))
    if cache_dir is None:
        embeddings = encoder.encode(unique)  # [U, D]
    else:
        path = text_cache_path(captions, encoder, cache_dir)
        clear_leftovers(path.parent)
        embeddings = _load(path, len(unique))
        if embeddings is None:
            embeddings = encoder.encode(unique)
            _save(path, embeddings)
    index_of = {caption: i for i, caption in enumerate(unique)}
    return embeddings[[index_of[caption] for caption in captions]]


def text_cache_path(captions: list[str], encoder, cache_dir: str | Path) -> Path:
    """The file of the embeddings of these captions, whether it is there or not; see `embed_captions`."""
    return Path(cache_dir).expanduser() / f"text_{_cache_key(captions, encoder.fingerprint())}.safetensors"


def _cache_key(captions, fingerprint):
    digest = hashlib.sha256()
    for text in (fingerprint, *captions):
        encoded = text.encode()
        digest.update(f"{len(encoded)}:".encode() + encoded)  # the length keeps ["ab"] apart from ["a", "b"]
    return digest.hexdigest()


def _load(path: Path, rows: int) -> torch.Tensor | None:
    try:
        embeddings = load_file(path)["text_embed"]
        if embeddings.dtype != torch.float32 or embeddings.dim() != 2 or len(embeddings) != rows:
            raise ValueError(f"{embeddings.dtype} {list(embeddings.shape)} instead of {rows} rows of float32")
    except FileNotFoundError:
        return None
    except (OSError, KeyError, ValueError, SafetensorError) as error:
        print(f"making the caption embeddings anew: cannot use {path} ({_one_line(error)})")
        return None
    return embeddings


def _save(path: Path, embeddings: torch.Tensor) -> None:
    try:
        with replacing(path) as temporary:
            save_file({"text_embed": embeddings.contiguous()}, temporary)
    except (OSError, SafetensorError) as error:
        print(f"warning: caption embeddings not cached, cannot write {path} ({_one_line(error)})")


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
