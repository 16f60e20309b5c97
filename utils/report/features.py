"""What networks say of pairs and of real pictures and captions: the map's places, and the search's ranks."""

from dataclasses import dataclass

import torch
from torch import Tensor

from data.pairs import RetrievalSet
from utils.forms import mix
from utils.report.pairs import data_uri
from utils.scoring import retrieval_features
from utils.sets import SynSet, fit_images

THUMBNAIL = 112
SHOWN = 5  # pictures per search


@dataclass
class Sample:
    """Pictures uint8 [N, 3, H, W], one caption of each and the captions' embeddings [N, D_text]."""

    images: Tensor
    captions: list[str]
    text_embed: Tensor

    def features(self, model, batch_size: int, device) -> tuple[Tensor, Tensor]:
        """Normalised features of pictures and captions, [N, D] each, on the CPU."""
        found = retrieval_features(model, self.images, self.text_embed, batch_size, device)
        return tuple(features.float().cpu() for features in found)


def take_sample(retrieval: tuple[RetrievalSet, Tensor], number: int) -> Sample:
    """Evenly spaced pictures of a split with the first caption of each: always the same ones."""
    whole, text_embed = retrieval
    size = len(whole.pictures)
    numbers = torch.linspace(0, size - 1, min(number, size)).round().long().tolist()
    rows = torch.tensor([(whole.caption_to_image == number).nonzero()[0].item() for number in numbers])
    return Sample(whole.some_images(numbers), [whole.captions[row] for row in rows.tolist()], text_embed[rows])


@torch.no_grad()
def pair_features(model, synset: SynSet, image_size: int, batch_size: int, device) -> tuple[Tensor, Tensor]:
    """Normalised features [M, D] of a set's pictures and of its text embeddings, on the CPU."""
    was_training = model.training
    model.eval()
    encoder = model.image_encoder
    images = fit_images(synset, image_size, encoder.mean, encoder.std)
    image_embed = torch.cat([model.embed_images(batch.to(device)) for batch in images.split(batch_size)])
    if synset.mixture:
        image_embed = mix(synset.mixture.weights.to(image_embed), image_embed)
    image_features = model.encode_image(image_embed)
    text_features = model.encode_text(synset.text_syn.float().to(device))
    model.train(was_training)
    return image_features.float().cpu(), text_features.float().cpu()


def principal_plane(features: Tensor) -> tuple[Tensor, Tensor, list[float]]:
    """PCA: the mean [D] of features [N, D], the first two axes [D, 2], and their shares of the variance.

    An axis' sign is that of its largest entry, so that the same features give the same plane.
    """
    mean = features.mean(dim=0)
    _, singular, axes = torch.linalg.svd(features - mean, full_matrices=False)
    axes = axes[:2]
    largest = axes.gather(1, axes.abs().argmax(dim=1, keepdim=True))
    variance = singular.square()
    return mean, (axes * largest.sign()).T, (variance[:2] / variance.sum()).tolist()


def search_ranks(image_features: Tensor, text_features: Tensor) -> list[dict]:
    """For each caption the pictures that rank first, by number, and the rank from 1 of its own, the same row's."""
    order = (text_features @ image_features.T).argsort(dim=1, descending=True, stable=True)
    ranks = (order == torch.arange(len(order))[:, None]).int().argmax(dim=1) + 1
    return [
        {"first": first, "rank": rank} for first, rank in zip(order[:, :SHOWN].tolist(), ranks.tolist(), strict=True)
    ]


def thumbnails(sample: Sample) -> list[str]:
    """A data URI for each picture."""
    return [data_uri(image.float() / 255, THUMBNAIL) for image in sample.images]
