"""Bytes of one expert on disk, ours against the authors' released layout, and what the smaller type does to matching.

    python -m benchmarks.expert_bytes

The expert takes one SGD step per epoch on random pictures and texts, from random weights. The released layout is
written as lists of float32 tensors of every epoch. The start of the image tower lies once in a folder: it is counted
by its share. The matching loss is that of a student of a few SGD steps, from what was read back against from the
float32 snapshots; its largest change over the start epochs that matching reads is shown, image and text term added.
"""

import argparse
import tempfile
from pathlib import Path

import torch
from torch.func import functional_call

from benchmarks.measure import table
from networks.clip_model import CLIPModel, ProjectionHead, trained_parameters
from networks.image_encoder import build_image_encoder
from networks.loss import PairLoss
from utils.experts.trajectory import Trajectory, save_trajectory
from utils.student import matching_loss


def take_steps(model, start, images, text_embed, steps: int, lr: float, temperature: float = 0.07):
    """Where `steps` SGD steps on the pairs (images [B, 3, H, W], text_embed [B, D]) lead from `start`, by name."""
    parameters = dict(start)
    for _ in range(steps):
        leaves = {name: value.detach().requires_grad_() for name, value in parameters.items()}
        loss = PairLoss(temperature=temperature)(*functional_call(model, leaves, (images, text_embed)))
        gradients = torch.autograd.grad(loss, list(leaves.values()))
        pairs = zip(leaves.items(), gradients, strict=True)
        parameters = {name: (value - lr * gradient).detach() for (name, value), gradient in pairs}
    return parameters


def matching_change(model, exact, stored, start_epochs, images, text_embed, steps: int, lr: float):
    """Matching loss and its largest absolute change over `start_epochs`, the target one epoch on.

    Args:
        exact, stored: functions from an epoch to a snapshot; the loss returned belongs to `exact`, last start epoch.
    """
    largest = 0.0
    for epoch in start_epochs:
        losses = []
        for snapshot in (exact, stored):
            start, target = snapshot(epoch), snapshot(epoch + 1)
            student = take_steps(model, start, images, text_embed, steps, lr)
            losses.append(sum(matching_loss(student, start, target, model.towers())).item())
        largest = max(largest, abs(losses[1] - losses[0]))
    return losses[0], largest


def main(argv=None):
    args = parse_args(argv)
    torch.manual_seed(0)
    encoder = build_image_encoder(args.image_encoder, args.image_size, pretrained=False)
    model = CLIPModel(encoder, ProjectionHead(args.text_dim, encoder.width)).eval()

    def draw_batch():
        return torch.randn(args.batch, 3, args.image_size, args.image_size), torch.randn(args.batch, args.text_dim)

    snapshots = [{name: p.detach().clone() for name, p in trained_parameters(model).items()}]
    for _ in range(args.epochs):
        snapshots.append(take_steps(model, snapshots[-1], *draw_batch(), 1, args.lr))
    kept = sorted({*range(args.keep_epochs + 1), args.epochs})
    ways = {
        f"ours, all {args.epochs + 1} snapshots, fp32": (list(range(args.epochs + 1)), "fp32"),
        f"ours, all {args.epochs + 1} snapshots, fp16 (default)": (list(range(args.epochs + 1)), "fp16"),
        f"ours, --keep_epochs {args.keep_epochs}, fp32": (kept, "fp32"),
        f"ours, --keep_epochs {args.keep_epochs}, fp16": (kept, "fp16"),
    }
    images, text_embed = draw_batch()
    rows = []
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        released = write_released(Path(folder), snapshots)
        rows.append([f"released, {args.epochs + 1} snapshots", f"{released:,}", "", "1.00", "", ""])
        for name, (epochs, snapshot_type) in ways.items():
            path = Path(folder, "ours", "expert_000.safetensors")
            save_trajectory(path, [snapshots[e] for e in epochs], {}, [], epochs, snapshot_type, shares_start=True)
            size, start = (f.stat().st_size for f in (path, next(path.parent.glob("start_*"))))
            stored = Trajectory(path).snapshot
            starts, student = range(args.keep_epochs), (images, text_embed, args.steps, args.lr_student)
            loss, change = matching_change(model, snapshots.__getitem__, stored, starts, *student)
            ratio = (size + start / args.num_experts) / released
            rows.append([name, f"{size:,}", f"{start:,}", f"{ratio:.3f}", f"{loss:.4f}", f"{change:.1e}"])
    parameters = sum(value.numel() for value in snapshots[0].values())
    print(
        f"{args.image_encoder}, {args.image_size} px, {parameters:,} parameters, {args.num_experts} experts a folder\n"
    )
    head = ["layout", "bytes per expert", "and once a folder", "share of released", "matching loss", "its change"]
    print(table(head, rows))


def write_released(folder: Path, snapshots) -> int:
    """Writes one expert in the released layout; returns the bytes of its two files."""
    total = 0
    for tower, prefix in (("img", "image_encoder."), ("txt", "text_projection.")):
        path = folder / f"{tower}_replay_buffer_0.pt"
        torch.save([[[v for n, v in snapshot.items() if n.startswith(prefix)] for snapshot in snapshots]], path)
        total += path.stat().st_size
        path.unlink()
    return total


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--image_encoder", default="nfnet_l0", help="a timm model, random weights")
    add("--image_size", type=int, default=64, help="side of the input in pixels")
    add("--text_dim", type=int, default=768, help="width of the text embeddings")
    add("--epochs", type=int, default=10, help="of the expert")
    add("--keep_epochs", type=int, default=2, help="as in buffer.py")
    add("--num_experts", type=int, default=20, help="that share the start of the image tower")
    add("--batch", type=int, default=4, help="pairs per step")
    add("--lr", type=float, default=0.1, help="rate of the expert, both towers")
    add("--steps", type=int, default=2, help="of the student")
    add("--lr_student", type=float, default=0.1, help="rate of the student, both towers")
    add("--folder", help="where to write, for a while; the system's temporary folder if not given")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
