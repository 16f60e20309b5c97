"""Training on a card: a step of an expert, and how long it waits for pictures; an evaluation of one network."""

import functools
import itertools
import tempfile
from pathlib import Path

import torch

from benchmarks.expert_step import draw_pictures
from benchmarks.gpu.setup import Setup, products_in
from benchmarks.measure import alternate, now
from data.annotations import Record
from data.augment import Augment, cached_side
from data.caches.pictures import cache_images
from data.pairs import PairDataset, RetrievalSet, pair_loader
from data.transforms import eval_transform, train_transform
from networks.clip_model import ModelFactory
from networks.image_encoder import build_image_encoder
from utils.scoring import Evaluation, device_batches, evaluate_retrieval, evaluate_synset
from utils.scoring.training import make_optimizer, train_epoch
from utils.sets import SynSet


def expert_step(setup: Setup):
    """Whole steps through the project's loader against the same steps on batches that are on the device already."""
    sizes = setup.sizes
    with tempfile.TemporaryDirectory() as folder:
        rows = -(-sizes.batch * sizes.batches // sizes.pictures)

        @functools.cache
        def drawn():
            paths = draw_pictures(Path(folder), sizes.pictures)
            return [Record(path.name, ["a caption"] * rows, path.stem) for path in paths], paths

        def cached():
            augment = Augment(sizes.image_size)
            cache = cache_images(drawn()[1], cached_side(sizes.image_size), folder)
            transform = as_it_is if setup.on_card else augment.one
            return PairDataset(*drawn(), transform, cache), augment if setup.on_card else None

        def decoded(transform):
            return PairDataset(*drawn(), transform), None

        ways = {
            "picture cache": cached,
            "decoded in each step": lambda: decoded(train_transform(sizes.image_size)),
            "decoded, not augmented": lambda: decoded(eval_transform(sizes.image_size)),
        }
        for name, make in ways.items():
            yield name, lambda name=name, make=make: {name: time_expert(setup, *make())}


def as_it_is(image):
    return image


def time_expert(setup: Setup, dataset, augment) -> dict:
    """The first quarter of an epoch warms up: kernels, the loader's processes and what they read ahead."""
    sizes, device = setup.sizes, setup.device
    encoder = build_image_encoder(sizes.encoder, sizes.image_size, pretrained=False)
    model = ModelFactory(lambda: encoder, True, sizes.text_dim, device=device).fresh(0)
    optimizer = make_optimizer(model, 1e-4, 1e-4, momentum=0.0, weight_decay=0.0)
    text_embed = torch.randn(len(dataset), sizes.text_dim)
    loader = pair_loader(dataset, sizes.batch, 0, setup.num_workers, drop_last=True)
    batches = device_batches(loader, text_embed, encoder, device, augment)

    def train(batches) -> float:
        started = now(device)
        train_epoch(model, batches, optimizer)
        return now(device) - started

    first = sizes.batches // 4
    count = sizes.batches - 1 - first
    with products_in("tf32"):
        kept = next(batches)
        train(itertools.islice(batches, first))
        seconds = train(itertools.islice(batches, count)) / count
        without_data = train([kept] * count) / count
    return {
        **{"s a step": seconds, "pictures/s": sizes.batch / seconds, "s without data": without_data},
        **{"share that waits for data": 1 - without_data / seconds, "loader processes": setup.num_workers},
    }


def evaluation(setup: Setup):
    """One fresh network trained on a set and tested, as distill.py and evaluate.py do it."""

    def measure() -> dict:
        sizes, device = setup.sizes, setup.device
        encoder = build_image_encoder(sizes.encoder, sizes.image_size, pretrained=False)
        factory = ModelFactory(lambda: encoder, True, sizes.text_dim, device=device)
        generator = torch.Generator().manual_seed(0)
        shape = sizes.pairs, 3, sizes.image_size, sizes.image_size
        images, texts = torch.randn(shape, generator=generator), torch.randn(sizes.pairs, sizes.text_dim)
        synset = SynSet(images, texts, 1e-3, 1e-3, ["a caption"] * sizes.pairs, encoder.mean, encoder.std)
        tests, shape = sizes.test_pictures, (sizes.test_pictures, 3, sizes.image_size, sizes.image_size)
        pictures = torch.randint(256, shape, dtype=torch.uint8, generator=generator)
        captions = torch.arange(tests).repeat_interleave(5)
        retrieval = (
            RetrievalSet(pictures, ["a caption"] * len(captions), captions),
            torch.randn(5 * tests, sizes.text_dim),
        )

        def score(epochs: int):
            evaluation = Evaluation(
                num_eval=1,
                epochs=epochs,
                batch_size=64,
                batch_size_test=128,
                image_size=sizes.image_size,
                temperature=0.07,
            )
            evaluate_synset(factory, synset, retrieval, evaluation, seed=0)

        with products_in("tf32"):
            score(1)  # loads kernels
            whole = alternate([lambda: score(sizes.eval_epochs)], 1, device)[0]
            model = factory.fresh(0)
            test = alternate([lambda: evaluate_retrieval(model, *retrieval, 128, device)], 1, device)[0]
        name = f"{sizes.pairs} pairs, {sizes.eval_epochs} epochs, {tests} test pictures"
        return {name: {"s": whole, "of it the test": test}}

    yield "one network", measure
