"""An outer iteration's gradient on one process and on several ranks: time, memory, bytes, and a larger case on paper.

    OMP_NUM_THREADS=1 python -m benchmarks.ranks --ranks 1 2
    python -m benchmarks.ranks --ranks 1 2 4 8 --image_encoder nfnet_l0 --image_size 224 --pairs 100 --steps 8

Each number of ranks is a start of torchrun on this machine (1: plain python), one after the other. All pairs are in
every step. Efficiency is the time of one process over ranks times theirs. Bytes are those that a rank sends in an
iteration, counted (a sum goes round a ring, a gathered part goes to each other rank) and by the formula that the paper
case uses.

The paper case is nfnet_l0 at 224 px, 100 pairs, T = 8: operations counted for one and two pairs and steps and continued
in straight lines, at --rate operations a second; bytes by the formula at --links bytes a second; nothing overlaps.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import torch

from benchmarks.measure import alternate, count_operations, describe_machine, peak_memory, table
from benchmarks.outer_gradient import PLAIN, Problem
from networks.clip_model import IMAGE
from utils import ranks

HEAD = ("ranks", "s", "of one's time", "efficiency", "GFLOP a rank", "peak GB a rank", "without θ_t")
HEAD += ("GB sent", "by formula")
PAPER_HEAD = ("ranks", "TFLOP a rank", "GB sent", *("s computing", "s sending", "of one's time", "efficiency"))
RESULT = "result: "


def sizes_of(problem: Problem) -> dict:
    """Numbers that bytes and operations depend on: of the towers' parameters, of features and of pixels of a pair."""
    parameters = {"image": 0, "text": 0}
    for name, value in problem.start.items():
        parameters["image" if problem.loss_fn.towers[name] == IMAGE else "text"] += value.numel()
    width = problem.model.image_encoder.width
    pixels, text = problem.pairs.image_syn[0].numel(), problem.pairs.text_syn[0].numel()
    return {**parameters, "width": width, "pixels": pixels, "text_dim": text}


def bytes_sent(sizes: dict, pairs: int, steps: int, count: int) -> int:
    """Of float32 that a rank sends in an iteration in which the image tower trains and all pairs are in every step.

    Forth a gather of U and a sum of the image tower's gradient in each step; back, a gather of Jb in each and a sum of
    λ in all but the first; at the end pixels and image rate are summed, texts and text rate come from rank 0.
    """
    if count == 1:
        return 0
    gathered = 2 * steps * -(-pairs // count) * sizes["width"] * (count - 1)
    summed = (2 * steps - 1) * sizes["image"] + pairs * sizes["pixels"] + 1
    return 4 * (gathered + 2 * (count - 1) * summed // count + pairs * sizes["text_dim"] + 1)


def work(args) -> None:
    """What each rank does; the first prints the result."""
    ranks.start()
    args.device = ranks.device(args.device)
    problem = Problem(args, args.pairs)
    call = lambda: problem.ours(args.steps, args.pair_chunk)  # noqa: E731
    call()
    before = ranks.bytes_sent()
    call()
    sent = ranks.bytes_sent() - before
    ranks.wait()
    (seconds,) = alternate([lambda: (call(), ranks.wait())], args.repeats, args.device)
    peak = max(ranks.gather(peak_memory(call, args.device)))
    # Beside the one in use; on a GPU they lie in the host's memory.
    stored = (args.steps - 1) * problem.bytes if args.device.type == "cpu" else 0
    planned = bytes_sent(sizes_of(problem), args.pairs, args.steps, ranks.count())
    numbers = {"seconds": seconds, "peak": peak, "stored": stored, "sent": sent, "planned": planned}
    numbers["operations"] = max(ranks.gather(count_operations(call)))
    if ranks.is_first():
        print(RESULT + json.dumps(numbers))
    ranks.end()


def start(count: int, argv: list[str]) -> dict:
    """The result of `count` ranks."""
    torchrun = ["torch.distributed.run", "--standalone", "--nproc_per_node", str(count), "-m"] if count > 1 else []
    command = [sys.executable, "-m", *torchrun, "benchmarks.ranks", *argv, "--worker"]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1])
    lines = [line for line in ended.stdout.splitlines() if line.startswith(RESULT)]
    if ended.returncode or not lines:
        raise SystemExit(f"{count} ranks failed:\n{ended.stderr}")
    return json.loads(lines[0].removeprefix(RESULT))


def measured(args, argv: list[str]) -> list[list[str]]:
    rows, one = [], None
    for count in args.ranks:
        numbers = start(count, argv)
        one = one or (numbers["seconds"] if count == 1 else None)
        share = numbers["seconds"] / one if one else float("nan")
        peak, stored = numbers["peak"], numbers["stored"]
        row = [str(count), f"{numbers['seconds']:.2f}", f"{share:.2f}", f"{1 / share / count:.2f}"]
        row += [f"{numbers['operations'] / 1e9:.1f}", f"{peak / 1e9:.3f}", f"{(peak - stored) / 1e9:.3f}"]
        rows.append([*row, f"{numbers['sent'] / 1e9:.4f}", f"{numbers['planned'] / 1e9:.4f}"])
    return rows


def operations(args, pairs: int, steps: int) -> float:
    """Of an outer gradient, from those of one and two pairs and steps."""
    counts = [[count_operations(lambda m=m, t=t: Problem(args, m).ours(t)) for t in (1, 2)] for m in (1, 2)]
    one, two = (by_steps[0] + (by_steps[1] - by_steps[0]) * (steps - 1) for by_steps in counts)
    return one + (two - one) * (pairs - 1)


def on_paper(args) -> list[list[str]]:
    """Rows of `PAPER_HEAD` for each kind of link and number of ranks."""
    case = argparse.Namespace(**{**vars(args), **PAPER, "device": torch.device("cpu")})
    sizes, rows = sizes_of(Problem(case, 1)), []
    whole = operations(case, case.pairs, case.steps)
    text = 18 * sizes["text"] * case.pairs * case.steps  # forth, back and twice differentiated; every rank's
    for link in args.links:
        for count in args.paper_ranks:
            own = (whole - text) * -(-case.pairs // count) / case.pairs + text
            sent = bytes_sent(sizes, case.pairs, case.steps, count)
            seconds = own / args.rate, sent / link
            share = sum(seconds) / (whole / args.rate)
            row = [f"{count}, {link / 1e9:g} GB/s", f"{own / 1e12:.2f}", f"{sent / 1e9:.2f}"]
            rows.append([*row, *(f"{s:.3f}" for s in seconds), f"{share:.2f}", f"{1 / share / count:.2f}"])
    return rows


PAPER = {"image_encoder": "nfnet_l0", "image_size": 224, "text_dim": 768, "pairs": 100, "steps": 8}


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--ranks", type=int, nargs="*", default=[1, 2], help="numbers of ranks to measure")
    add("--image_encoder", default="test_nfnet", help="a timm model, random weights")
    add("--image_size", type=int, default=64, help="side of the input in pixels")
    add("--text_dim", type=int, default=64, help="width of the text embeddings")
    add("--pairs", type=int, default=32, help="number of pairs M, all of them in every step")
    add("--steps", type=int, default=2, help="number of student steps T")
    add("--pair_chunk", type=int, help="pairs of a rank at a time; all if not given")
    add("--repeats", type=int, default=5, help="times are medians of so many")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--paper_ranks", type=int, nargs="*", default=[1, 8], help="numbers of ranks of the paper case; none skips it")
    add("--rate", type=float, default=50e12, help="operations a second that a card of the paper case does")
    add("--links", type=float, nargs="+", default=[300e9, 25e9, 12.5e9], help="bytes a second that it sends")
    add("--worker", action="store_true", help=argparse.SUPPRESS)
    parser.set_defaults(**PLAIN)
    return parser.parse_args(argv)


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    args = parse_args(argv)
    if args.worker:
        work(args)
        return
    if args.ranks:
        print(f"{args.image_encoder}, {args.image_size} px, {args.pairs} pairs, {args.steps} steps; ", end="")
        print(f"{describe_machine(torch.device(args.device))}; {time.strftime('%Y-%m-%d')}\n")
        print(table(HEAD, measured(args, argv)))
    if args.paper_ranks:
        case = f"{PAPER['image_encoder']}, {PAPER['image_size']} px, {PAPER['pairs']} pairs, {PAPER['steps']} steps"
        print(f"\nOn paper: {case}, at {args.rate / 1e12:g} TFLOP/s\n")
        print(table(PAPER_HEAD, on_paper(args)))


if __name__ == "__main__":
    main()
