"""Scoring a set of pairs: fresh models trained on it, and their recalls."""

import functools
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from data.errors import InputError
from networks.loss import PairLoss
from utils import ranks
from utils.forms import mix, one_of_each, with_views
from utils.scoring.retrieval import evaluate_retrieval
from utils.scoring.training import NonFiniteLoss, train_on_pairs
from utils.sets import SynSet, fit_images

# Models that score a set start from other random numbers than the experts (seed + n) it was made from.
VALIDATION_SEED, TEST_SEED = 1_000_000, 2_000_000
VIEW_SEED = 3_000_000  # of the views that networks train on
_KEPT = weakref.WeakKeyDictionary()  # see `_word_features`
BEST_LOOK = "best_look_"  # before the names of a best look's recalls


def look_epochs(epochs: int, looks: int) -> list[int]:
    """The numbers of `looks` equally spaced epochs, the last one included. Raises InputError if there are fewer."""
    if looks > epochs:
        raise InputError(f"--looks {looks} is more than --epoch_eval_train {epochs}; lower it or train longer")
    return [epochs * look // looks for look in range(1, looks + 1)]


@dataclass(frozen=True)
class Evaluation:
    """How networks that score a set train, and how they are looked at.

    Attributes:
        num_eval: fresh networks.
        epochs, batch_size, temperature: of their training, see `train_on_pairs`.
        batch_size_test: pictures at a time where nothing trains.
        image_size: side of the square input in pixels.
        views: of each picture beside itself, of which a network sees one in an epoch, see `training_images`.
        looks: number of epochs at which to measure recalls; those of the best one, by `r_mean`, are among a model's
            numbers too, with `BEST_LOOK` before their names. Chosen on what they are measured on, they flatter.
    """

    num_eval: int
    epochs: int
    batch_size: int
    batch_size_test: int
    image_size: int
    temperature: float
    views: int = 0
    looks: int = 0


def evaluate_synset(
    factory, synset: SynSet, retrieval, evaluation: Evaluation, seed: int, on_model: Callable | None = None
) -> list[dict[str, float]]:
    """Recalls of fresh models, each trained on the set alone with the set's rates, shared by the ranks.

    Args:
        factory: `ModelFactory` of the encoders to train.
        retrieval: (RetrievalSet, text_embed [C, D_text]) to measure recall on, see also `embedded_once`.
        evaluation: how many models, and how they train.
        seed: model k starts from seed + k.
        on_model: called with each model that this rank trains; the next one takes its storage. The last one is
            rank 0's.

    Raises:
        NonFiniteLoss: on every rank, the loss of a network became infinite or not a number.
    """
    at_epochs = look_epochs(evaluation.epochs * synset.phases, evaluation.looks or 1)
    text_embed = synset.text_syn.float().to(factory.device)
    targets = None if synset.targets is None else synset.targets.float().to(factory.device)
    sizes = evaluation.image_size, evaluation.batch_size_test
    images = training_images(factory, synset, *sizes, seed, evaluation.views)

    def train_and_look(k: int) -> dict[str, float]:
        model, seen = factory.fresh(seed + k, PairLoss(synset.loss_type, evaluation.temperature)), []

        def look(epoch):
            if epoch in at_epochs:
                seen.append(evaluate_retrieval(model, *retrieval, evaluation.batch_size_test, factory.device))

        loss = train_on_pairs(
            model,
            images.behind(model) if isinstance(images, MixedPictures) else images,
            text_embed,
            lr_img=synset.syn_lr_img,
            lr_txt=synset.syn_lr_txt,
            epochs=evaluation.epochs,
            batch_size=evaluation.batch_size,
            seed=seed + k,
            targets=targets,
            phases=synset.phases,
            on_epoch=look,
        )
        if on_model is not None:
            on_model(model)
        best = max(seen, key=lambda recall: recall["r_mean"]) if evaluation.looks else {}
        return {**seen[-1], "train_loss": loss, **{BEST_LOOK + key: value for key, value in best.items()}}

    title = "networks trained on the pairs" if evaluation.num_eval > 1 else None
    results = ranks.spread(_finite_or_error(train_and_look), range(evaluation.num_eval), title)
    for result in results:
        if isinstance(result, NonFiniteLoss):
            raise result
    return results


def _finite_or_error(train: Callable) -> Callable:
    """Gives a network's NonFiniteLoss back, so that all ranks learn of it."""

    def call(k: int):
        try:
            return train(k)
        except NonFiniteLoss as error:
            return error

    return call


def training_images(
    factory, synset: SynSet, image_size: int, batch_size: int, seed: int = 0, views: int = 0
) -> "Tensor | MixedPictures | Callable[[torch.Generator], Tensor]":
    """What networks of `factory` train on: pictures [M, 3, H, W], or a frozen encoder's output for them [M, D_enc].

    With `views`, a function that draws such a tensor: of each picture itself or one of so many views (of mixtures: of
    each picture that they are mixed from). They are the same for all networks and sets, see `VIEW_SEED`.
    """
    if synset.mixture and factory.image_trainable:
        pictures = list(_shown(factory, synset, image_size, views))
        return MixedPictures(synset.mixture.weights.to(factory.device), pictures)
    if synset.mixture:
        features = _word_features(factory, synset, image_size, batch_size, views)
        weights = synset.mixture.weights.to(features[0])
        draw = functools.partial(one_of_each, features)
        return (lambda generator: mix(weights, draw(generator))) if views else mix(weights, features[0])
    shown = _shown(factory, synset, image_size, views)
    if not factory.image_trainable:
        model = factory.fresh(seed)
        shown = [embed_batches(model, images, batch_size) for images in shown]
    shown = list(shown)
    return functools.partial(one_of_each, shown) if views else shown[0]


@dataclass(frozen=True)
class MixedPictures:
    """Mixtures for an encoder that trains: in every step all real pictures go through it, and are mixed after it.

    Attributes:
        weights: [M, N].
        shown: the N real pictures [N, 3, H, W], then each view of them.
    """

    weights: Tensor
    shown: list[Tensor]

    def behind(self, model) -> "_Behind | Callable[[torch.Generator], _Behind]":
        """What `train_on_pairs` takes: mixtures after the image encoder of `model`; with views drawn for each epoch."""
        if len(self.shown) == 1:
            return _Behind(model, self.weights, self.shown[0])
        return lambda generator: _Behind(model, self.weights, one_of_each(self.shown, generator))


@dataclass(frozen=True)
class _Behind:
    model: torch.nn.Module
    weights: Tensor
    pictures: Tensor

    def __getitem__(self, rows: Tensor) -> Tensor:  # [B, D_enc]
        return mix(self.weights[rows], self.model.embed_images(self.pictures))


def _shown(factory, synset: SynSet, image_size: int, views: int) -> Iterator[Tensor]:
    """The pictures [P, 3, H, W], then each view of them."""
    encoder = factory.encoder
    images = fit_images(synset, image_size, encoder.mean, encoder.std)
    images = images.to(factory.device, memory_format=torch.channels_last)
    return with_views(images, encoder.mean, encoder.std, views, VIEW_SEED)


def _word_features(factory, synset: SynSet, image_size: int, batch_size: int, views: int) -> list[Tensor]:
    """A frozen encoder's outputs [N, D_enc] for what mixtures are made of, then for each view of it.

    Those of the factory's last set are kept.
    """
    words, kept = synset.mixture.words, _KEPT.get(factory)
    if kept is None or kept[0] is not words or kept[1] != (image_size, views):
        model = factory.fresh(0)
        features = [embed_batches(model, images, batch_size) for images in _shown(factory, synset, image_size, views)]
        _KEPT[factory] = kept = words, (image_size, views), features
    return kept[2]


@torch.no_grad()
def embed_batches(model, images: Tensor, batch_size: int) -> Tensor:
    """A frozen encoder's output [M, D_enc] for pictures [M, 3, H, W], `batch_size` at a time."""
    return torch.cat([model.embed_images(part) for part in images.split(batch_size)])
