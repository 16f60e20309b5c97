"""Seconds and memory of single steps, on numbers drawn at random that have the widths of the run."""

import resource
import sys
import time
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from data.annotations import read_sentences
from data.pairs import PairDataset, RetrievalSet
from networks.clip_model import CLIPModel, ModelFactory, trained_parameters
from networks.loss import PairLoss
from utils.forms import pair_features
from utils.matching import Dictionary
from utils.scoring import evaluate_retrieval, evaluate_synset, make_optimizer, train_epoch
from utils.sets import Pairs, SynSet, as_synset
from utils.setup.backbones import Backbone, make_draws, settings_of_encoder
from utils.setup.dictionary import MOST_CAPTIONS
from utils.setup.first_pairs import first_pairs
from utils.setup.networks import make_evaluation, make_factory
from utils.setup.student import Student, pairs_of_encoder, seen_pictures
from utils.student import mean_matching

RATE = 1e-3  # a learning rate with which no drawn numbers go astray
CHOICE_SHARE = 50  # the choice of a coreset is tried on one in so many pictures


def seconds(call: Callable, device: torch.device, times: int = 1) -> float:
    """Of one call, the mean of `times`, when the device has done all that it was given."""
    _wait(device)
    start = time.perf_counter()
    for _ in range(times):
        call()
    _wait(device)
    return (time.perf_counter() - start) / times


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def host_peak() -> int:
    """Bytes that this process had in memory at most."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


@dataclass(frozen=True)
class DrawnExpert:
    """Takes the place of an expert's trajectory: the start, moved a little at random with each epoch."""

    start: dict[str, Tensor]

    def snapshot(self, epoch: int) -> dict[str, Tensor]:
        return {name: value.cpu() + epoch * RATE * torch.randn(value.shape) for name, value in self.start.items()}


def drawn_scored(pairs: PairDataset, factory: ModelFactory, args) -> tuple[tuple[RetrievalSet, Tensor], float]:
    """A split to measure recall on, of drawn numbers, and how many times larger the real one is.

    An encoder that trains sees two batches of pictures instead of all.
    """
    pictures, captions = len(pairs.paths), len(pairs)
    some = min(pictures, 2 * args.batch_size_test) if factory.image_trainable else pictures
    rows = captions * some // pictures
    whole = RetrievalSet(
        torch.zeros(some if factory.image_trainable else 0, 3, args.image_size, args.image_size, dtype=torch.uint8),
        captions=[],
        caption_to_image=torch.arange(rows) % some,
        image_embed=None if factory.image_trainable else torch.randn(some, factory.encoder.width).to(factory.device),
    )
    return (whole, torch.randn(rows, factory.text_dim)), pictures / some


def recall_seconds(model: CLIPModel, scored: tuple, args, device: torch.device) -> float:
    (whole, text_embed), larger = scored
    return larger * seconds(lambda: evaluate_retrieval(model, whole, text_embed, args.batch_size_test, device), device)


def expert_seconds(factory: ModelFactory, pairs: dict[str, PairDataset], args, loss: PairLoss) -> tuple[float, float]:
    """(of a training step, of the recall on validation after an epoch; 0 if that is not among `pairs`)."""
    device, size = factory.device, min(args.batch_size_train, len(pairs["train"]))
    shape = (3, args.image_size, args.image_size) if factory.image_trainable else (factory.encoder.width,)
    batch = torch.randn(size, *shape).to(device), torch.randn(size, factory.text_dim).to(device)
    model = factory.fresh(args.seed, loss)
    optimizer = make_optimizer(model, RATE, RATE, momentum=0.0, weight_decay=0.0)

    def step() -> None:
        train_epoch(model, [batch], optimizer)

    step()  # the first one is slower
    of_step = seconds(step, device, times=3)
    scored = "val" in pairs and drawn_scored(pairs["val"], factory, args)
    return of_step, recall_seconds(model, scored, args, device) if scored else 0.0


def choice_seconds(choose: Callable, real: PairDataset, widths: tuple[int, int], args) -> float:
    """Of a coreset's choice, choose(features, row_to_image, text_embed), whose time is in proportion to the pairs."""
    pictures = min(len(real.paths), max(args.num_queries, len(real.paths) // CHOICE_SHARE))
    groups = real.row_to_image[real.row_to_image < pictures]
    image_embed, text_embed = torch.randn(pictures, widths[0]), torch.randn(len(groups), widths[1])
    features = pair_features(args.features, image_embed, text_embed, groups)
    return len(real) / len(groups) * seconds(lambda: choose(features, groups, text_embed), torch.device("cpu"))


class DistillationTrial:
    """Students and networks on drawn numbers, over pictures of the train split that stand for the first ones."""

    def __init__(self, args, factories: dict[str, ModelFactory], pairs: dict[str, PairDataset]):
        # k-means would need the features of all pictures.
        self.args = args = Namespace(**{**vars(args), "pix_init": args.pix_init.replace("kmeans", "real")})
        self.scored, real = pairs["val"], pairs["train"]
        self.backbones = [self._backbone(name, factory) for name, factory in factories.items()]
        text_dim = self.backbones[0].factory.text_dim
        first, self.form = first_pairs(args, real, torch.randn(1, text_dim).expand(len(real), -1), self.backbones)
        first.text_syn = torch.randn_like(first.text_syn)
        for rate in (first.syn_lr_img, first.syn_lr_txt):
            rate.fill_(RATE)
        self.pairs = first
        self.dictionary = self._dictionary(real, text_dim)
        seen = self.seen()
        self.students = [
            Student(args, backbone, pairs_of_encoder(seen, number), self.form)
            for number, backbone in enumerate(self.backbones)
        ]

    def _backbone(self, name: str, factory: ModelFactory) -> Backbone:
        own = Namespace(**settings_of_encoder(vars(self.args), name))
        model = factory.fresh(own.seed, PairLoss(own.loss_type, own.student_temperature))
        start = {name: value.detach().clone() for name, value in trained_parameters(model).items()}
        experts = [DrawnExpert(start)]
        judge = make_factory(own, factory.text_dim, train_in_full=True) if own.eval_full else factory
        return Backbone(name, factory, judge, model, {}, experts, make_draws(own, experts), {})

    def _dictionary(self, real: PairDataset, text_dim: int) -> Dictionary | None:
        if self.args.txt_param != "mixture":
            return None
        words = self.args.txt_words
        number = len(read_sentences(words)) if words else min(MOST_CAPTIONS, len(set(real.captions)))
        embeddings = torch.randn(number, text_dim).to(self.pairs.text_syn.device)
        return Dictionary([""] * number, embeddings, min(self.args.txt_terms, number))

    def seen(self) -> Pairs:
        seen = replace(self.pairs, image_syn=seen_pictures(self.args, self.form, self.pairs.image_syn, 0))
        return replace(seen, text_syn=self.dictionary.project(seen.text_syn)) if self.dictionary else seen

    def segment_bytes(self) -> int:
        """Of the snapshots of an iteration's segments, of all encoders."""
        starts = [sum(value.nbytes for value in backbone.start.values()) for backbone in self.backbones]
        return 2 * self.args.segments * sum(starts)

    def iteration_seconds(self) -> float:
        """Of an iteration; of several encoders those that are drawn in it."""
        device = self.pairs.text_syn.device
        total = seconds(self.seen, device)
        for number, student in enumerate(self.students):
            pairs, segments = pairs_of_encoder(self.seen(), number), student.draws.read(0, device)
            student.run(mean_matching, segments, pairs=pairs)  # the first one is slower
            total += seconds(lambda run=student.run, s=segments, p=pairs: run(mean_matching, s, pairs=p), device)
        drawn = self.args.encoders_per_step or len(self.students)
        return total * drawn / len(self.students)

    def evaluation_seconds(self) -> float:
        """Of an evaluation: --num_eval networks over each encoder, and their recall."""
        captions = [""] * self.args.num_queries
        names = [backbone.name for backbone in self.backbones]
        with torch.no_grad():
            pairs = replace(self.pairs, text_syn=self.seen().text_syn)
            synset = as_synset(pairs, self.form, captions, names, vars(self.args), 0, None)
        return self.args.num_eval * sum(self._network_seconds(backbone, synset) for backbone in self.backbones)

    def _network_seconds(self, backbone: Backbone, synset: SynSet) -> float:
        judge, synset = backbone.judge, replace(synset.for_encoder(backbone.name), syn_lr_img=RATE, syn_lr_txt=RATE)
        scored = drawn_scored(self.scored, judge, self.args)

        def train(epochs: int) -> float:
            evaluation = replace(make_evaluation(self.args), num_eval=1, epochs=epochs)
            return seconds(lambda: evaluate_synset(judge, synset, scored[0], evaluation, seed=0), judge.device)

        train(1)  # the first one is slower
        of_one, of_three = train(1), train(3)
        of_epoch = max(0.0, (of_three - of_one) / 2)
        recall = recall_seconds(judge.fresh(0), scored, self.args, judge.device) * (1 - 1 / scored[1])
        return of_one + (self.args.epoch_eval_train - 1) * of_epoch + recall
