"""Time of an outer iteration: ours against one that builds the model anew and reads the expert's whole file.

    python -m benchmarks.outer_iteration --image_encoder nfnet_l0 --image_size 64 --pairs 4 --steps 1

All take the same two snapshots of the same expert, random, of --epochs epochs, and our gradient; ours reads them one
iteration ahead. As released, a text encoder of BERT-base's size is built in each iteration too, here without its file.

    python -m benchmarks.outer_iteration --of_heads 2304 768 100 20 8 --of_heads 1024 384 100 100 8

The students of heads alone, on random embeddings: with the rows of all steps (utils/student/heads.py) against stored
weights. Errors are the largest of any learned tensor in float32, against stored weights in float64.
"""

import argparse
import itertools
import pickle
import tempfile
from pathlib import Path

import torch
import transformers
from torch import nn

from benchmarks.measure import alternate, describe_machine, peak_memory, table
from benchmarks.outer_gradient import PLAIN, Problem
from networks.clip_model import CLIPModel, ProjectionHead, trained_parameters
from networks.image_encoder import build_image_encoder
from networks.loss import PairLoss
from utils.experts.trajectory import Trajectory, save_trajectory
from utils.matching.prefetch import Prefetch
from utils.sets import Pairs, draw_batches, initial_similarity
from utils.student import StudentLoss, matching_gradient, prepare, to_device
from utils.student.heads import history_is_smaller, match_heads

COLUMNS = "width", "texts", "pairs", "batch", "steps", "weights, s", "rows, s", "factor", "weights, GB", "rows, GB"
COLUMNS += "taken", "error with weights", "with rows"


class Iterations:
    """The two ways, on one problem and one expert's file in each layout."""

    def __init__(self, args, folder: Path):
        self.args, self.folder = args, folder
        self.problem = Problem(args, args.pairs)
        start = {name: value.cpu() for name, value in self.problem.start.items()}
        self.names = list(start)
        snapshots = [{n: v + 0.01 * torch.randn(v.shape) for n, v in start.items()} for _ in range(args.epochs + 1)]
        save_trajectory(folder / "expert.safetensors", snapshots, {}, [])
        (folder / "expert.pt").write_bytes(pickle.dumps([list(snapshot.values()) for snapshot in snapshots]))
        self.expert = Trajectory(folder / "expert.safetensors")
        self.prefetch = Prefetch(self._read, 10**9)
        self.count = itertools.count()

    def _read(self, iteration: int):
        return [prepare(self.expert.snapshot(epoch), self.args.device) for epoch in (0, 1)]

    def gradient(self):
        self.problem.ours(self.args.steps)

    def ours(self):
        snapshots = self.prefetch.take(next(self.count))
        self.problem.start, self.problem.target = (to_device(snapshot, self.args.device) for snapshot in snapshots)
        self.gradient()

    def rebuilding(self):
        encoder = build_image_encoder(self.args.image_encoder, self.args.image_size, pretrained=False)
        CLIPModel(encoder, ProjectionHead(self.args.text_dim, encoder.width)).to(self.args.device)
        snapshots = pickle.loads((self.folder / "expert.pt").read_bytes())
        self.problem.start, self.problem.target = (
            {n: v.to(self.args.device) for n, v in zip(self.names, snapshot, strict=True)} for snapshot in snapshots[:2]
        )
        self.gradient()

    def as_released(self):
        transformers.BertModel(transformers.BertConfig()).to(self.args.device)
        self.rebuilding()


class Heads:
    """Two heads on random embeddings, WBCE with low-rank soft targets, dropout of 0.1."""

    def __init__(self, args, width, text_dim, pairs, batch, steps):
        torch.manual_seed(0)
        of_texts, of_images = ProjectionHead(text_dim, width), ProjectionHead(width, width)
        model = CLIPModel(nn.Identity(), of_texts, False, of_images, PairLoss("WBCE"))
        self.model = model.to(args.device).train()
        self.loss_fn, self.momentum = StudentLoss(self.model, alpha=3.0).on_embeddings(), args.momentum
        self.start = {name: p.detach().clone() for name, p in trained_parameters(self.model).items()}
        self.target = {name: value + 1e-3 * torch.randn_like(value) for name, value in self.start.items()}
        generator = torch.Generator().manual_seed(0)
        learned = torch.randn(pairs, width), torch.randn(pairs, text_dim), *torch.full((2,), 0.1).unbind()
        similarity = initial_similarity("lowrank", pairs, 10, generator)
        self.pairs = Pairs.of(tensor.to(args.device) for tensor in (*learned, *similarity))
        self.batches = draw_batches(pairs, batch, steps, generator, "permutation")

    def double(self):
        self.model.double()
        self.start, self.target = ({n: v.double() for n, v in end.items()} for end in (self.start, self.target))
        self.pairs = Pairs.of(tensor.double() for tensor in self.pairs.tensors())
        return self

    def weights(self):
        return matching_gradient(*self._arguments(), None, self.momentum)

    def rows(self):
        return match_heads(*self._arguments(), self.momentum, 1.0)

    def _arguments(self):
        return self.loss_fn, self.start, self.target, self.pairs, self.batches, 0

    def is_taken(self) -> bool:
        return history_is_smaller(self.loss_fn, self.start, self.batches)


def largest_error(matching, exact) -> float:
    pairs = zip(matching.gradient.tensors(), exact.gradient.tensors(), strict=True)
    return max(((value.double() - true).norm() / true.norm()).item() for value, true in pairs)


def heads_row(args, size) -> list[str]:
    heads = Heads(args, *size)
    ways = heads.weights, heads.rows
    seconds = alternate(ways, args.repeats, args.device)
    peaks = [peak_memory(way, args.device) / 1e9 for way in ways]
    found = [way() for way in ways]
    exact = heads.double().weights()
    cells = [*map(str, size), *(f"{s:.2f}" for s in seconds), f"{seconds[0] / seconds[1]:.1f}"]
    cells += [*(f"{peak:.2f}" for peak in peaks), "rows" if heads.is_taken() else "weights"]
    return [*cells, *(f"{largest_error(matching, exact):.1e}" for matching in found)]


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--image_encoder", default="nfnet_l0", help="a timm model, random weights")
    add("--image_size", type=int, default=64, help="side of the input in pixels")
    add("--text_dim", type=int, default=768, help="width of the text embeddings")
    add("--pairs", type=int, default=4, help="number of pairs M, all of them in every step")
    add("--steps", type=int, default=1, help="number of student steps T")
    add("--epochs", type=int, default=10, help="of the expert; its file holds one snapshot more")
    add(
        "--of_heads",
        type=int,
        nargs=5,
        action="append",
        metavar=("WIDTH", "TEXTS", "PAIRS", "BATCH", "STEPS"),
        help="of students of heads: width of features, of texts, pairs, pairs in a step, steps; again for another row",
    )
    add("--momentum", type=float, default=0.0, help="of the students of --of_heads")
    add("--repeats", type=int, default=5, help="times are medians of so many")
    add("--device", type=torch.device, default="cuda" if torch.cuda.is_available() else "cpu")
    parser.set_defaults(**PLAIN)
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    if args.of_heads:
        print(f"{describe_machine(args.device)}\n\n{table(COLUMNS, [heads_row(args, size) for size in args.of_heads])}")
        return
    print(f"{args.image_encoder}, {args.image_size} px, {args.pairs} pairs, {args.steps} steps")
    print(f"{describe_machine(args.device)}\n")
    with tempfile.TemporaryDirectory() as folder:
        iterations = Iterations(args, Path(folder))
        ways = {
            "the gradient alone": iterations.gradient,
            "ours, read ahead": iterations.ours,
            "image encoder built and file read in each": iterations.rebuilding,
            "text encoder built too, as released": iterations.as_released,
        }
        seconds = alternate(list(ways.values()), args.repeats, args.device)
        iterations.prefetch.close()
    rows = [[way, f"{taken:.2f}", f"{taken / seconds[-1]:.2f}"] for way, taken in zip(ways, seconds, strict=True)]
    print(table(("outer iteration", "s", "share of the last"), rows))


if __name__ == "__main__":
    main()
