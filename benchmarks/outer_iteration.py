"""Time of an outer iteration: ours against one that builds the model anew and reads the expert's whole file.

    python -m benchmarks.outer_iteration --image_encoder nfnet_l0 --image_size 64 --pairs 4 --steps 1

All take the same two snapshots of the same expert, random, of --epochs epochs, and our gradient; ours reads them one
iteration ahead. As released, a text encoder of BERT-base's size is built in each iteration too, here without its file.
"""

import argparse
import itertools
import pickle
import tempfile
from pathlib import Path

import torch
import transformers

from benchmarks.measure import alternate, describe_machine, table
from benchmarks.outer_gradient import PLAIN, Problem
from networks.clip_model import CLIPModel, ProjectionHead
from networks.image_encoder import build_image_encoder
from utils.experts.trajectory import Trajectory, save_trajectory
from utils.matching.prefetch import Prefetch
from utils.student import prepare, to_device


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


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--image_encoder", default="nfnet_l0", help="a timm model, random weights")
    add("--image_size", type=int, default=64, help="side of the input in pixels")
    add("--text_dim", type=int, default=768, help="width of the text embeddings")
    add("--pairs", type=int, default=4, help="number of pairs M, all of them in every step")
    add("--steps", type=int, default=1, help="number of student steps T")
    add("--epochs", type=int, default=10, help="of the expert; its file holds one snapshot more")
    add("--repeats", type=int, default=5, help="times are medians of so many")
    add("--device", type=torch.device, default="cuda" if torch.cuda.is_available() else "cpu")
    parser.set_defaults(**PLAIN)
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
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
