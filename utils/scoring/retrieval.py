"""Retrieval: recall both ways, and the nearest caption of an embedding."""

from dataclasses import replace

import torch
import torch.nn.functional as F

from data.transforms import normalize

CUTOFFS = (1, 5, 10)
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
    return torch.cat([(rows @ database.T).topk(k, dim=1).indices for rows in queries.split(block)])


@torch.no_grad()
def evaluate_retrieval(model, retrieval_set, text_embed, batch_size: int, device) -> dict[str, float]:
    """Recalls of `model` on a `RetrievalSet` whose captions are embedded as text_embed [C, D_text].

    Its pictures may be those of `embedded_once`.
    """
    was_training = model.training
    model.eval()
    image_embed = embed_pictures(model, retrieval_set.images, batch_size, device)
    image_features = [model.encode_image(rows) for rows in image_embed.split(8192)]
    text_features = [model.encode_text(rows.to(device)) for rows in text_embed.split(8192)]
    model.train(was_training)
    return recalls(torch.cat(image_features), torch.cat(text_features), retrieval_set.caption_to_image)


def embed_pictures(model, images, batch_size: int, device):
    """The image encoder's output [N, D_enc] for uint8 pictures [N, 3, H, W]; what is 2-d already is only moved."""
    if images.ndim == 2:
        return images.to(device)
    mean, std = model.image_encoder.mean, model.image_encoder.std
    return torch.cat([model.embed_images(normalize(part.to(device), mean, std)) for part in images.split(batch_size)])


@torch.no_grad()
def embedded_once(retrieval, factory, batch_size: int):
    """(RetrievalSet, text_embed) with the pictures' embeddings in their place, if the factory's encoder is frozen."""
    retrieval_set, text_embed = retrieval
    if factory.image_trainable:
        return retrieval
    image_embed = embed_pictures(factory.fresh(0).eval(), retrieval_set.images, batch_size, factory.device)
    return replace(retrieval_set, images=image_embed), text_embed


def nearest_captions(text_syn, text_embed, captions: list[str]) -> list[str]:
    """The caption with the highest cosine similarity to each row: text_syn [M, D], text_embed [N, D]."""
    queries = F.normalize(text_syn.detach().float().cpu(), dim=-1)
    nearest = (queries @ F.normalize(text_embed.float(), dim=-1).T).argmax(dim=1)
    return [captions[i] for i in nearest.tolist()]
