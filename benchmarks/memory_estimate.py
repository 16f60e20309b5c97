"""Estimates the memory of an outer gradient at a size too large for this machine, from small ones measured on it.

    python -m benchmarks.memory_estimate --image_encoder nfnet_l0 --image_size 224 --pairs 100

The peak of tensors in use (benchmarks/measure.py) is measured for two chunk sizes and two numbers of pairs, and
continued in straight lines. θ_t in the host's memory are left out, the model, the two snapshots, the pairs, their
gradient and momentum added. Workspaces of a GPU's convolutions and the allocator's gaps are not in it.
"""

import argparse

import torch

from benchmarks.measure import peak_memory, table
from benchmarks.outer_gradient import Problem


def peak(args, num_pairs: int, chunk: int | None) -> int:
    """Bytes of one outer gradient of two steps without the one stored θ_t."""
    problem = Problem(args, num_pairs)
    return peak_memory(lambda: problem.ours(2, chunk), args.device) - problem.bytes


def line(sizes: tuple[int, int], peaks: tuple[int, int], at: int) -> float:
    slope = (peaks[1] - peaks[0]) / (sizes[1] - sizes[0])
    return peaks[0] + slope * (at - sizes[0])


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--image_encoder", default="nfnet_l0", help="a timm model, random weights")
    add("--image_size", type=int, default=224, help="side of the input in pixels")
    add("--text_dim", type=int, default=768, help="width of the text embeddings")
    add("--pairs", type=int, default=100, help="number of pairs M, all of them in every step")
    add("--pair_chunk", type=int, nargs="+", default=[4, 10, 25, 50], help="chunk sizes to estimate")
    add("--measured", type=int, nargs=2, default=[1, 2], help="chunk sizes to measure")
    parser.set_defaults(
        device=torch.device("cpu"), lr_img=0.01, lr_txt=0.01, temperature=0.07, lora_rank=None, heads=False
    )
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    small, large = args.measured
    whole = peak(args, small, None), peak(args, large, None)
    chunked = peak(args, large, small), peak(args, 2 * large, small), peak(args, 2 * large, large)
    extra_pairs = line((large, 2 * large), chunked[:2], args.pairs) - chunked[1]  # from 2 · large to M pairs
    problem = Problem(args, 1)
    standing = 3 * problem.bytes + 3 * args.pairs * (3 * args.image_size**2 + args.text_dim) * 4
    rows = [["all pairs", line((small, large), whole, args.pairs)]]
    rows += [[str(c), line((small, large), chunked[1:], c) + extra_pairs] for c in args.pair_chunk]
    print(
        f"{args.image_encoder}, {args.image_size} px, {args.pairs} pairs in every step, θ {problem.bytes / 1e9:.2f} GB"
    )
    print(f"a pair {(whole[1] - whole[0]) / (large - small) / 1e6:.0f} MB in one piece\n")
    head = "chunk", "outer gradient GB", "with model, snapshots, pairs GB"
    print(table(head, [[name, f"{size / 1e9:.2f}", f"{(size + standing) / 1e9:.2f}"] for name, size in rows]))


if __name__ == "__main__":
    main()
