"""The plan of each script: what its run reads, caches and keeps, its memory, and its hours by a short trial."""

from collections.abc import Callable

import torch

from networks.clip_model import ModelFactory, trained_parameters
from networks.loss import PairLoss
from utils.device import describe_device
from utils.matching import FIT
from utils.setup.networks import find_device
from utils.setup.plan.caches import Cache, Planned
from utils.setup.plan.trials import DistillationTrial, choice_seconds, expert_seconds, host_peak, seconds

FIT_PASSES = 19  # iterations that the search for the first rates takes, three times a bisection of 49 and one more


def plan_experts(args, missing: dict[str, int], snapshots: int) -> None:
    """Of buffer.py. `missing`: experts to train, by image encoder; `snapshots`: that each one keeps."""
    plan = Plan(args, scored=("val",))
    caches, of_experts = plan.captions("train", "val"), []
    for name, factory in plan.factories.items():
        if factory.image_trainable:
            caches += [plan.read.pictures()] if args.cache_images else []
        else:
            views = 0 if args.no_aug else args.aug_views
            caches += [plan.read.features("train", name, views), plan.read.features("val", name)]
        size = trajectory_bytes(factory, snapshots, args.snapshot_type)
        print(f"experts of {name}: {missing[name]} to train, {gigabytes(size)} each in --buffer_path")
        of_step, recall = expert_seconds(factory, plan.read.pairs, args, PairLoss(args.loss_type, args.temperature))
        of_experts.append(plan.training(name, of_step, recall, missing[name] * args.train_epochs))
    plan.caches(caches)
    plan.end(caches, of_experts)


def plan_coreset(args, choose: Callable | None) -> None:
    """Of coreset.py. `choose`: see `choice_seconds`; None where no features are compared."""
    plan = Plan(args, num_queries=args.num_queries)
    ((name, factory),) = plan.factories.items()
    caches, hours, real = plan.captions("train"), [], plan.read.pairs["train"]
    if args.method == "forgetting":
        caches += [] if factory.image_trainable else [plan.read.features("train", name)]
        of_step, _ = expert_seconds(factory, {"train": real}, args, PairLoss(temperature=args.temperature))
        hours.append(plan.training(name, of_step, 0.0, args.train_epochs))
    elif choose is not None:
        caches += [] if args.features == "text" else [plan.read.features("train", name)]
        taken = choice_seconds(choose, real, (factory.encoder.width, factory.text_dim), args)
        print(f"the choice by {args.method}: {duration(taken)}, by a trial on a part of the pairs")
        hours.append(taken)
    plan.caches(caches)
    plan.end(caches, hours)


def plan_distillation(args) -> None:
    """Of distill.py; there need be no experts yet."""
    plan = Plan(args, scored=("val", "test"), num_queries=args.num_queries)
    caches = plan.captions("train", "val", "test")
    for number, (name, factory) in enumerate(plan.factories.items()):
        if number == 0 and args.pix_init == "kmeans":
            caches.append(plan.read.features("train", name))
        if not factory.image_trainable:
            caches += [plan.read.features(split, name) for split in ("val", "test")]
    plan.caches(caches)
    trial = DistillationTrial(args, plan.factories, plan.read.pairs)
    of_iteration, of_evaluation = trial.iteration_seconds(), trial.evaluation_seconds()
    fit = FIT_PASSES if FIT in (args.lr_teacher_img, args.lr_teacher_txt) else 0
    evaluations = len({*range(0, args.Iteration, args.eval_it), args.Iteration}) + 1  # the last one on test
    more = f" and {fit} more to fit the first rates" if fit else ""
    print(f"an iteration: {of_iteration:.3g} s; {args.Iteration:,} of them{more}")
    print(f"an evaluation: {duration(of_evaluation)}; {evaluations:,} of them")
    taken = [(args.Iteration + fit) * of_iteration, evaluations * of_evaluation]
    plan.end(caches, taken, also_held=2 * trial.segment_bytes())  # those of the next iteration are read meanwhile


class Plan:
    """The lines that all scripts have. Raises InputError as `open_data`."""

    def __init__(self, args, **opened):
        self.args, self.device = args, find_device(args)
        print(describe_device(self.device))
        print("a plan: nothing is encoded, trained or written")
        self.read = Planned(args, **opened)
        self.factories: dict[str, ModelFactory] = self.read.factories
        self.base = host_peak()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        for what, count in (("pictures", lambda pairs: len(pairs.paths)), ("captions", len)):
            print(f"{what}: " + ", ".join(f"{count(pairs):,} {split}" for split, pairs in self.read.pairs.items()))

    def captions(self, *splits: str) -> list[Cache]:
        return [self.read.captions(split) for split in splits]

    def training(self, name: str, of_step: float, recall: float, epochs: int) -> float:
        """Seconds of so many epochs, after a line on them."""
        steps = -(-len(self.read.pairs["train"]) // self.args.batch_size_train)
        of_epoch = steps * of_step + recall
        print(f"training over {name}: {of_step:.3g} s a step, {duration(of_epoch)} an epoch; {epochs:,} epochs")
        return epochs * of_epoch

    def caches(self, caches: list[Cache]) -> None:
        for cache in caches:
            there = ", there already" if cache.path.exists() else ""
            print(f"cached {cache.name}: {gigabytes(cache.bytes)}{there}")
        missing = sum(cache.bytes for cache in caches if not cache.path.exists())
        total = sum(cache.bytes for cache in caches)
        print(f"caches together: {gigabytes(total)} in {self.args.cache_dir}, {gigabytes(missing)} yet to be written")

    def end(self, caches: list[Cache], taken: list[float], also_held: int = 0) -> None:
        """Memory and hours in all; `taken` are the seconds of the parts, `also_held` bytes beside data and trial."""
        trial, texts = host_peak() - self.base, self.read.texts_held()
        features = sum(cache.bytes for cache in caches if cache.name.startswith("features"))
        held = max(2 * texts[0], sum(texts) + features)  # train's are held twice while they are read
        print(f"memory of the host: about {gigabytes(self.base + held + trial + also_held)}")
        if self.device.type == "cuda":
            print(f"memory of the card: {gigabytes(torch.cuda.max_memory_allocated(self.device))} in the trial")
        made = self.encoding(caches)
        print(
            f"in all: about {duration(made + sum(taken))}, {duration(made)} of it to encode what is not cached; "
            "without the time to read and decode pictures"
        )

    def encoding(self, caches: list[Cache]) -> float:
        """Seconds that the encoders need for the caches that are missing, by a batch of each."""
        total, missing = 0.0, [cache for cache in caches if cache.rows and not cache.path.exists()]
        for name, factory in self.factories.items():
            rows = sum(cache.rows for cache in missing if cache.name.endswith(f" by {name}"))
            if rows:
                total += rows * self._picture_seconds(factory)
        if rows := sum(cache.rows for cache in missing if cache.name.startswith("captions")):
            captions = list(dict.fromkeys(self.read.pairs["train"].captions[:1024]))[:256]
            total += rows * seconds(lambda: self.read.text_encoder.encode(captions), self.device) / len(captions)
        return total

    @torch.no_grad()
    def _picture_seconds(self, factory: ModelFactory) -> float:
        size, side = self.args.batch_size_test, self.args.image_size
        encoder = factory.encoder.to(self.device, memory_format=torch.channels_last).eval()
        images = torch.randn(size, 3, side, side).to(self.device, memory_format=torch.channels_last)
        encoder(images)  # the first one is slower
        return seconds(lambda: encoder(images), self.device) / size


def trajectory_bytes(factory: ModelFactory, snapshots: int, snapshot_type: str) -> int:
    """Of an expert's file: the first snapshot, but what the folder's experts share, and the later ones."""
    named = trained_parameters(factory.fresh(0))
    shared = factory.starts_pretrained and factory.lora is None
    first = sum(p.nbytes for name, p in named.items() if not (shared and name.startswith("image_encoder.")))
    later = sum(p.nbytes for p in named.values()) // (2 if snapshot_type == "fp16" else 1)
    return first + (snapshots - 1) * later


def duration(taken: float) -> str:
    """Of seconds."""
    for unit, name in ((3600, "hours"), (60, "minutes")):
        if taken >= 2 * unit:
            return f"{taken / unit:,.1f} {name}"
    return f"{taken:.3g} s"


def gigabytes(size: float) -> str:
    return f"{size / 1e9:.3g} GB" if size >= 1e8 else f"{size / 1e6:.3g} MB"
