"""Scoring a set of pairs: fresh models trained on it, their recalls, and the table."""

import statistics
from collections.abc import Callable

import torch
import torch.nn.functional as F

from utils.scoring.retrieval import RECALLS, evaluate_retrieval
from utils.scoring.training import train_on_pairs
from utils.synset import SynSet

# Models that score a set start from other random numbers than the experts (seed + n) it was made from.
VALIDATION_SEED, TEST_SEED = 1_000_000, 2_000_000


def fit_images(synset: SynSet, image_size: int, mean, std) -> torch.Tensor:
    """The set's pictures for an encoder: resized to [M, 3, image_size, image_size], normalised with its mean, std."""
    images = synset.image_syn.float()
    if images.shape[-1] != image_size:
        images = F.interpolate(images, (image_size, image_size), mode="bicubic", antialias=True, align_corners=False)
    if (tuple(mean), tuple(std)) == (tuple(synset.mean), tuple(synset.std)):
        return images
    old_mean, old_std, mean, std = (
        torch.tensor(v).view(3, 1, 1).to(images) for v in (synset.mean, synset.std, mean, std)
    )
    return (images * old_std + old_mean - mean) / std


def evaluate_synset(
    factory,
    synset: SynSet,
    retrieval,
    num_eval: int,
    epochs: int,
    batch_size: int,
    batch_size_test: int,
    image_size: int,
    temperature: float,
    seed: int,
    on_model: Callable | None = None,
) -> list[dict[str, float]]:
    """Recalls of `num_eval` fresh models, each trained on the set alone with the set's rates.

    Args:
        factory: `ModelFactory` of the encoders to train.
        retrieval: (RetrievalSet, text_embed [C, D_text]) to measure recall on.
        seed: model k starts from seed + k.
        on_model: called with each trained model; the next one takes its storage.
    """
    images = fit_images(synset, image_size, factory.encoder.mean, factory.encoder.std)
    images = images.to(factory.device, memory_format=torch.channels_last)
    text_embed = synset.text_syn.float().to(factory.device)
    results = []
    for k in range(num_eval):
        model = factory.fresh(seed + k)
        rates = synset.syn_lr_img, synset.syn_lr_txt
        loss = train_on_pairs(model, images, text_embed, *rates, epochs, batch_size, temperature, seed + k)
        recall = evaluate_retrieval(model, *retrieval, batch_size_test, factory.device)
        results.append({**recall, "train_loss": loss})
        if on_model is not None:
            on_model(model)
    return results


def mean_and_std(results: list[dict[str, float]]) -> tuple[dict[str, float], dict[str, float]]:
    """Means and population standard deviations of each number over the models."""
    columns = {key: [result[key] for result in results] for key in results[0]}
    return {k: statistics.fmean(v) for k, v in columns.items()}, {k: statistics.pstdev(v) for k, v in columns.items()}


def recall_table(rows: dict[tuple | str, list[dict[str, float]]], columns: tuple[str, ...] = ("set",)) -> str:
    """Markdown: a row per entry, recalls in per cent as mean ± std over its models.

    A key of `rows` is what stands in the first `columns`: a tuple, or a string if it is one column.
    """
    head = [*columns, "TR@1", "TR@5", "TR@10", "IR@1", "IR@5", "IR@10", "mean"]
    lines = [head, ["---"] * len(head)]
    for name, results in rows.items():
        mean, std = mean_and_std(results)
        lines.append(
            [*([name] if isinstance(name, str) else name), *(f"{mean[key]:.1f} ± {std[key]:.1f}" for key in RECALLS)]
        )
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
