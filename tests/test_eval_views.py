"""Networks that train on a set see its pictures, or what mixtures are made of, in views that each epoch draws anew."""

from dataclasses import replace

import pytest
import torch

from data.pairs import RetrievalSet
from networks.clip_model import ModelFactory
from networks.image_encoder import build_image_encoder
from utils.forms import USUAL, Mixture, as_words, mix, view_normalised
from utils.scoring import Evaluation, evaluate_synset
from utils.scoring.evaluation import VIEW_SEED, embed_batches, training_images
from utils.scoring.training import train_on_pairs
from utils.sets import SynSet, fit_images

SIDE, PAIRS, WORDS, TEXT_DIM = 32, 5, 7, 6


def factory(trainable):
    return ModelFactory(
        lambda: build_image_encoder("test_nfnet", SIDE, False), False, TEXT_DIM, image_trainable=trainable
    )


def make_set(of, mixture=False) -> SynSet:
    generator = torch.Generator().manual_seed(2)
    mean, std = of.encoder.mean, of.encoder.std
    images = torch.randn(PAIRS, 3, SIDE, SIDE, generator=generator)
    texts = torch.randn(PAIRS, TEXT_DIM, generator=generator)
    words = as_words(torch.randint(256, (WORDS, 3, SIDE, SIDE), dtype=torch.uint8, generator=generator))
    weights = torch.randn(PAIRS, WORDS, generator=generator)
    mixed = Mixture(weights, words) if mixture else None
    return SynSet(images, texts, 0.05, 0.05, [""] * PAIRS, mean, std, mixture=mixed)


def views_of(images, encoder, number):
    generator = torch.Generator().manual_seed(VIEW_SEED)
    made = [view_normalised(images, encoder.mean, encoder.std, USUAL, generator) for _ in range(number)]
    return torch.stack([images, *made])


def drawn_by_hand(shown, generator):
    """Row by row, of [V, P, ...]."""
    numbers = torch.randint(len(shown), (shown.shape[1],), generator=generator).tolist()
    return torch.stack([shown[number, row] for row, number in enumerate(numbers)])


@pytest.mark.parametrize("kind", ["pixels", "frozen", "mixture"])
def test_an_epoch_sees_one_view_of_each_picture(kind):
    of = factory(trainable=kind == "pixels")
    synset = make_set(of, mixture=kind == "mixture")
    draw = training_images(of, synset, SIDE, 3, seed=1, views=2)
    shown = views_of(fit_images(synset, SIDE, of.encoder.mean, of.encoder.std), of.encoder, 2)
    if kind != "pixels":
        shown = torch.stack([embed_batches(of.fresh(1), images, 100) for images in shown])
    generators = [torch.Generator().manual_seed(8) for _ in range(2)]
    epochs = []
    for _ in range(3):
        expected = drawn_by_hand(shown, generators[0])
        if kind == "mixture":  # a view for each word, the same for all pairs
            expected = mix(synset.mixture.weights, expected)
        epochs.append(draw(generators[1]))
        assert torch.allclose(epochs[-1], expected, atol=1e-5)
    assert not torch.allclose(epochs[0], epochs[1], atol=1e-3)


def evaluation(views):
    sizes = {"num_eval": 2, "epochs": 3, "batch_size": 3, "batch_size_test": 4, "image_size": SIDE}
    return Evaluation(**sizes, temperature=0.07, views=views)


def retrieval():
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(256, (8, 3, SIDE, SIDE), dtype=torch.uint8, generator=generator)
    return RetrievalSet(images, [""] * 8, torch.arange(8)), torch.randn(8, TEXT_DIM, generator=generator)


@pytest.mark.parametrize("kind", ["pixels", "frozen", "mixture"])
def test_recalls_with_views_are_the_same_twice_and_none_changes_nothing(kind):
    def results(views):
        of = factory(trainable=kind == "pixels")
        return evaluate_synset(of, make_set(of, mixture=kind == "mixture"), retrieval(), evaluation(views), seed=30)

    with_views, without = results(3), results(0)
    assert with_views == results(3)
    assert [result["train_loss"] for result in with_views] != [result["train_loss"] for result in without]
    of = factory(trainable=kind == "pixels")
    synset = make_set(of, mixture=kind == "mixture")
    model = of.fresh(30)
    images = training_images(of, synset, SIDE, 4)
    assert isinstance(images, torch.Tensor)
    assert without[0]["train_loss"] == train_on_pairs(model, images, synset.text_syn, 0.05, 0.05, 3, 3, 30)


def test_views_of_words_are_made_once_for_a_set_and_anew_for_another_number():
    of = factory(trainable=False)
    synset = make_set(of, mixture=True)
    calls, fresh = [], of.fresh
    of.fresh = lambda *args: calls.append(args) or fresh(*args)
    for views in (2, 2, 1, 0):
        training_images(of, synset, SIDE, 3, views=views)
    assert len(calls) == 3
    training_images(of, replace(synset, mixture=replace(synset.mixture, words=list(synset.mixture.words))), SIDE, 3)
    assert len(calls) == 4
