"""Time of one expert step: cached captions and pictures against embedding the captions and decoding in each step.

    python -m benchmarks.expert_step

nfnet_l0 and a text encoder of BERT-base's size, random weights; generated 500x375 JPEGs; the project's own data set,
loader, augmentation and optimizer. The ways take their steps in turns. A text encoder pads a batch to its longest
caption, so the captions here, of random tokens, have all one length: 35 is what the longest of 128 Flickr30K validation
captions has on average in BERT's tokens (128 is the published batch), 24 what the longest of 8 has.

"data" is the wait for the loader and for pictures to reach the device; every part ends with a synchronisation.
"""

import argparse
import statistics
import tempfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode
from transformers import BertConfig, BertModel

from benchmarks.measure import now, table
from data.annotations import Record
from data.augment import Augment, cached_side
from data.caches.pictures import cache_images
from data.pairs import PairDataset, pair_loader
from data.transforms import normalize, train_transform
from networks.clip_model import CLIPModel, ProjectionHead
from networks.image_encoder import build_image_encoder
from utils.scoring.training import make_optimizer

PARTS = ("data", "captions", "forward", "backward", "optimizer")


class Step:
    """The model, and one training step with its parts timed."""

    def __init__(self, args):
        self.device = args.device
        encoder = build_image_encoder(args.image_encoder, args.image_size, pretrained=False)
        self.text_encoder = BertModel(BertConfig()).eval().requires_grad_(False).to(self.device)
        self.model = CLIPModel(encoder, ProjectionHead(self.text_encoder.config.hidden_size, encoder.width))
        self.model.to(self.device, memory_format=torch.channels_last).train()
        self.optimizer = make_optimizer(self.model, args.lr, args.lr, momentum=0.0, weight_decay=0.0)

    def embed(self, tokens: torch.Tensor) -> torch.Tensor:  # [B, L] -> [B, D_text]
        with torch.no_grad():
            return self.text_encoder(tokens.to(self.device)).last_hidden_state[:, 0]

    def __call__(self, batches, embed, augment) -> list[float]:
        """One step; seconds of each of PARTS. `embed` is a function from row numbers to embeddings."""
        times = [now(self.device)]
        images, rows = next(batches)
        images = images.to(self.device, non_blocking=True)
        if augment is not None:
            images = augment(images)
        encoder = self.model.image_encoder
        images = normalize(images, encoder.mean, encoder.std)
        times.append(now(self.device))
        text_embed = embed(rows).to(self.device)
        times.append(now(self.device))
        loss = self.model.loss(*self.model(images, text_embed))
        times.append(now(self.device))
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        times.append(now(self.device))
        self.optimizer.step()
        times.append(now(self.device))
        return [after - before for before, after in zip(times, times[1:], strict=False)]

    def captions_share(self, args, tokens: torch.Tensor | None) -> str:
        """Share of the captions in a step's floating-point operations, in per cent."""
        if tokens is None:
            return "0 %"
        images = torch.zeros(args.batch, 3, args.image_size, args.image_size, device=self.device)
        with FlopCounterMode(display=False) as of_captions:
            text_embed = self.embed(tokens)
        with FlopCounterMode(display=False) as of_rest:
            self.model.loss(*self.model(images, text_embed)).backward()
        captions, rest = of_captions.get_total_flops(), of_rest.get_total_flops()
        return f"{100 * captions / (captions + rest):.0f} %"


def draw_pictures(folder: Path, count: int) -> list[Path]:
    """JPEGs of 500x375 pixels: coarse colours with some grain."""
    generator, paths = np.random.default_rng(0), []
    for i in range(count):
        coarse = Image.fromarray(generator.integers(0, 256, (24, 32, 3), dtype=np.uint8))
        pixels = np.asarray(coarse.resize((500, 375), Image.Resampling.BICUBIC)).astype(np.int16)
        grain = generator.normal(0, 12, (375, 500, 1))
        paths.append(folder / f"{i:04d}.jpg")
        Image.fromarray((pixels + grain).clip(0, 255).astype(np.uint8)).save(paths[-1], quality=90)
    return paths


def make_ways(args, step: Step, folder: Path) -> dict:
    """For each way its endless batches, its embedding of rows, its augmentation on the device, and its tokens."""
    paths = draw_pictures(folder, args.pictures)
    records = [Record(path.name, ["a caption"], path.stem) for path in paths]
    generator = torch.Generator().manual_seed(0)
    embeddings = torch.randn(len(paths), 768, generator=generator)
    cache, augment = cache_images(paths, cached_side(args.image_size), folder), Augment(args.image_size)
    on_device = args.device.type == "cuda"
    cached = PairDataset(records, paths, _as_it_is if on_device else augment.one, cache)
    decoded = PairDataset(records, paths, train_transform(args.image_size))
    ways = {"cached": (cached, embeddings.__getitem__, augment if on_device else None, None)}
    for length in args.tokens:
        tokens = torch.randint(1000, 30000, (args.batch, length), generator=generator)
        ways[f"decoded and embedded, {length} tokens"] = (
            decoded,
            lambda rows, tokens=tokens: step.embed(tokens),
            None,
            tokens,
        )
    return {name: (endless(dataset, args), *rest) for name, (dataset, *rest) in ways.items()}


def endless(dataset, args):
    loader = pair_loader(dataset, args.batch, 0, args.num_workers, drop_last=True)
    while True:
        yield from loader


def _as_it_is(image):
    return image


def main(argv=None):
    args = parse_args(argv)
    torch.manual_seed(0)
    step, taken = Step(args), {}
    with tempfile.TemporaryDirectory() as folder:
        ways = make_ways(args, step, Path(folder))
        for repeat in range(args.repeats + 1):
            for name, (batches, embed, augment, _) in ways.items():
                seconds = step(batches, embed, augment)
                if repeat > 0:  # the first warms up
                    taken.setdefault(name, []).append(seconds)
    print(
        f"{args.image_encoder}, {args.image_size} px, batch {args.batch}, {args.num_workers} workers, {args.device}, "
        f"{torch.get_num_threads()} thread(s); medians of {args.repeats} steps\n"
    )
    head = ["step", "s", "cached / this", "images/s", *(f"{part}, s" for part in PARTS), "captions by count"]
    tokens = [tokens for *_, tokens in ways.values()]
    rows = make_rows(args, taken, [step.captions_share(args, t) for t in tokens])
    print(table(head, rows))


def make_rows(args, taken: dict[str, list[list[float]]], shares: list[str]) -> list[list[str]]:
    """A row for each way; the first is what the others are compared with."""
    rows, first = [], None
    for (name, steps), share in zip(taken.items(), shares, strict=True):
        total = statistics.median(sum(seconds) for seconds in steps)
        first = first or total
        parts = [f"{statistics.median(column):.3f}" for column in zip(*steps, strict=True)]
        rows.append([name, f"{total:.2f}", f"{first / total:.2f}", f"{args.batch / total:.2f}", *parts, share])
    return rows


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--image_encoder", default="nfnet_l0", help="a timm model, random weights")
    add("--image_size", type=int, default=224, help="side of the input in pixels")
    add("--batch", type=int, default=8, help="pairs per step")
    add("--tokens", type=int, nargs="+", default=[35, 24], help="lengths of the captions in tokens, a row for each")
    add("--pictures", type=int, default=64, help="JPEGs to generate")
    add("--repeats", type=int, default=7, help="times are medians of so many")
    add("--num_workers", type=int, default=0, help="loader processes")
    add("--lr", type=float, default=1e-3, help="rate of both towers")
    add("--device", type=torch.device, default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
