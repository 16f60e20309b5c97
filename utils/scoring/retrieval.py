"""Retrieval: recall both ways, and the nearest caption of an embedding."""

import torch
import torch.nn.functional as F

from data.transforms import normalize
from networks.loss import similarities

CUTOFFS = (1, 5, 10)
BLOCK = 4096  # captions that are normalised and compared at a time: no copy of all embeddings
RECALLS = ("txt_r1", "txt_r5", "txt_r10", "img_r1", "img_r5", "img_r10", "r_mean")


def recalls(image_features, text_features, caption_to_image) -> dict[str, float]:
    """Recall at 1, 5 and 10 in per cent, over all images and all captions.

    txt_rK (the paper's TR@K): share of images one of whose captions ranks in the top K of all captions.
    img_rK (IR@K): share of captions whose image ranks in the top K. r_mean: mean of the six.

    Args:
        image_features: [N, D], normalised. text_features: [C, D], normalised.
        caption_to_image: [C], the index of each caption's image.
    """
    caption_to_image = caption_to_image.to(image_features.device)
    image_index = torch.arange(len(image_features), device=image_features.device)
    to_texts = _top(image_features, text_features)  # [N, 10] captions
    to_images = _top(text_features, image_features)  # [C, 10] images
    hits = {
        "txt": caption_to_image[to_texts] == image_index[:, None],
        "img": to_images == caption_to_image[:, None],
    }
    result = {
        f"{way}_r{k}": 100 * hit[:, :k].any(dim=1).float().mean().item() for way, hit in hits.items() for k in CUTOFFS
    }
    for way in hits:
        result[f"{way}_r_mean"] = sum(result[f"{way}_r{k}"] for k in CUTOFFS) / len(CUTOFFS)
    result["r_mean"] = (result["txt_r_mean"] + result["img_r_mean"]) / 2
    return result


def _top(queries, database, block: int = 1024):
    k = min(max(CUTOFFS), len(database))
    return torch.cat([similarities(rows, database).topk(k, dim=1).indices for rows in queries.split(block)])


@torch.no_grad()
def evaluate_retrieval(model, retrieval_set, text_embed, batch_size: int, device) -> dict[str, float]:
    """Recalls of `model` on a `RetrievalSet` whose captions are embedded as text_embed [C, D_text]."""
    images = retrieval_set.images if retrieval_set.image_embed is None else retrieval_set.image_embed
    image_features, text_features = retrieval_features(model, images, text_embed, batch_size, device)
    return recalls(image_features, text_features, retrieval_set.caption_to_image)


@torch.no_grad()
def retrieval_features(model, images, text_embed, batch_size: int, device):
    """Normalised features of pictures and of texts [C, D_text]: [N, D] and [C, D] on the device.

    Args:
        images: uint8 [N, 3, H, W], or what a frozen image encoder gave for them [N, D_enc].
    """
    was_training = model.training
    model.eval()
    image_embed = embed_pictures(model, images, batch_size, device)
    image_features = [model.encode_image(rows) for rows in image_embed.split(8192)]
    text_features = [model.encode_text(rows.to(device)) for rows in text_embed.split(8192)]
    model.train(was_training)
    return torch.cat(image_features), torch.cat(text_features)


def embed_pictures(model, images, batch_size: int, device):
    """The image encoder's output [N, D_enc] for uint8 pictures [N, 3, H, W]; what is 2-d already is only moved."""
    if images.ndim == 2:
        return images.to(device)
    mean, std = model.image_encoder.mean, model.image_encoder.std
    return torch.cat([model.embed_images(normalize(part.to(device), mean, std)) for part in images.split(batch_size)])


def nearest_captions(text_syn, text_embed, captions: list[str]) -> list[str]:
    """The caption with the highest cosine similarity to each row: text_syn [M, D], text_embed [N, D]."""
    return [nearest[0][0] for nearest in nearest_with_cosine(text_syn, text_embed, captions, num=1)]


def nearest_with_cosine(text_syn, text_embed, captions: list[str], num: int) -> list[list[tuple[str, float]]]:
    """For each row of text_syn [M, D] up to `num` distinct captions and their cosines, nearest first.

    Args:
        text_embed: [N, D], of the captions. One that several rows of it share counts once.
    """
    queries = F.normalize(text_syn.detach().float().cpu(), dim=-1)
    # Published captions hardly repeat; some spare ones are enough.
    spare = 8 * num if num > 1 else 1
    values, rows = queries.new_empty(len(queries), 0), torch.empty(len(queries), 0, dtype=torch.long)
    for first, block in zip(range(0, len(text_embed), BLOCK), text_embed.split(BLOCK), strict=True):
        cosines = queries @ F.normalize(block.float(), dim=-1).T
        values = torch.cat([values, cosines], dim=1)
        rows = torch.cat([rows, torch.arange(first, first + len(block)).expand(len(queries), -1)], dim=1)
        values, best = values.topk(min(spare, values.shape[1]), dim=1)
        rows = rows.gather(1, best)
    nearest = []
    for cosines, numbers in zip(values.tolist(), rows.tolist(), strict=True):
        distinct = {}
        for cosine, number in zip(cosines, numbers, strict=True):
            distinct.setdefault(captions[number], cosine)
        nearest.append(list(distinct.items())[:num])
    return nearest
