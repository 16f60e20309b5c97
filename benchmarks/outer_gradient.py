"""Time, memory and agreement of the outer gradient: ours against a full unroll that keeps every step's graph.

    python -m benchmarks.outer_gradient --steps 2 4 8 --pairs 16
    python -m benchmarks.outer_gradient --steps 2 --pairs 100 500 --pair_chunk 20 --no_unroll
    python -m benchmarks.outer_gradient --image_encoder nfnet_l0 --image_size 224 --pairs 100 --steps 8 --device cuda
    python -m benchmarks.outer_gradient --heads --image_encoder mobilenetv1_100 --image_size 160 --pairs 100 --steps 8

The same networks, pairs and seeds in one run, taken in turns; the full unroll runs with torch's own activations.
"""

import argparse

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.measure import Tf32, alternate, count_operations, describe_machine, matrix_rate, peak_memory, table
from networks.clip_model import IMAGE, CLIPModel, ProjectionHead, trained_parameters
from networks.derivatives.activations import SiLU
from networks.image_encoder import build_image_encoder
from networks.lora import Lora, add_lora
from networks.loss import PairLoss
from utils.sets import Pairs
from utils.student import LEAST, Keep, StudentLoss, matching_gradient

# What a `Problem` takes besides device and sizes, where nothing else is asked for.
PLAIN = {"lr_img": 0.01, "lr_txt": 0.01, "temperature": 0.07, "lora_rank": None, "lora_layers": "attn", "heads": False}
HEAD = (
    *("T", "M", "way", "s", "peak GB", "without θ_t", "relative error", "cosine", "error to float64"),
    *("cosine to float64", "GFLOP", "share of matrix rate"),
)


class Problem:
    """A student, an expert's two snapshots and M pairs, all random and the same for the same arguments.

    The parameters are moved from their first values, where some gains are zero and hide most of the network.
    """

    def __init__(
        self,
        args,
        num_pairs: int,
        dtype=torch.float32,
        bf16=False,
        own_activations=True,
        adapted=True,
        every_step=False,
    ):
        torch.manual_seed(0)
        encoder = build_image_encoder(args.image_encoder, args.image_size, pretrained=False)
        if args.lora_rank and adapted:
            add_lora(encoder, Lora(args.lora_rank, args.lora_rank, args.lora_layers))
        of_images = ProjectionHead(encoder.width, encoder.width, dropout=0.0) if args.heads else None
        if args.heads:
            encoder.requires_grad_(False)
        of_texts = ProjectionHead(args.text_dim, encoder.width, dropout=0.0)
        model = CLIPModel(encoder, of_texts, bf16, of_images, PairLoss(temperature=args.temperature))
        if not own_activations:
            put_back_activations(model)
        channels_last = {"memory_format": torch.channels_last}
        self.model = model.to(args.device, dtype).to(**channels_last).train()
        self.loss_fn = StudentLoss(self.model)
        if every_step:
            self.loss_fn.frozen_encoder = None

        def noise(*shape):
            return torch.randn(shape).to(args.device, dtype)

        named = trained_parameters(self.model).items()
        self.start = {name: p.detach() + 0.02 * noise(*p.shape) for name, p in named}
        self.target = {name: value + 0.01 * noise(*value.shape) for name, value in self.start.items()}
        images = noise(num_pairs, 3, args.image_size, args.image_size).to(**channels_last)
        rates = (torch.tensor(rate, dtype=dtype, device=args.device) for rate in (args.lr_img, args.lr_txt))
        self.pairs = Pairs(images, noise(num_pairs, args.text_dim), *rates)
        self.bytes = sum(value.nbytes for value in self.start.values())

    def ours(self, steps: int, pair_chunk=None, keep=LEAST) -> list[torch.Tensor]:
        batches = [torch.arange(len(self.pairs.image_syn))] * steps
        arguments = self.loss_fn, self.start, self.target, self.pairs, batches, 0, pair_chunk
        return list(matching_gradient(*arguments, keep=keep).gradient.tensors())

    def unroll(self, steps: int) -> list[torch.Tensor]:
        """The gradient by keeping everything."""
        leaves = images, text_embed, lr_img, lr_txt = [t.detach().requires_grad_() for t in self.pairs.tensors()]
        params = {name: value.detach().requires_grad_() for name, value in self.start.items()}
        for _ in range(steps):
            loss = self.loss_fn(params, images, text_embed)
            grads = torch.autograd.grad(loss, list(params.values()), create_graph=True)
            params = {
                name: value - (lr_img if self.loss_fn.towers[name] == IMAGE else lr_txt) * grad
                for (name, value), grad in zip(params.items(), grads, strict=True)
            }
        loss = 0
        for image_tower in (True, False):
            names = [name for name in params if (self.loss_fn.towers[name] == IMAGE) == image_tower]
            distance, travelled = (
                sum(((values[n] - self.target[n]) ** 2).sum() for n in names) for values in (params, self.start)
            )
            loss = loss + distance / travelled
        return list(torch.autograd.grad(loss, leaves))


def in_tf32(problem: Problem, steps: int) -> list[torch.Tensor]:
    if problem.start["text_projection.fc.weight"].device.type == "cpu":
        with Tf32():
            return problem.ours(steps)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    try:
        return problem.ours(steps)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False


def put_back_activations(model: nn.Module) -> None:
    for module in model.modules():
        for name, child in module.named_children():
            if isinstance(child, SiLU):
                setattr(module, name, nn.SiLU())


def agreement(gradient, expected) -> tuple[str, str]:
    """Relative error and cosine of the pixels' gradient."""
    value, expected = gradient[0].double().flatten(), expected[0].double().flatten()
    error = (value - expected).norm() / expected.norm()
    return f"{error:.1e}", f"{F.cosine_similarity(value, expected, dim=0):.6f}"


def measure(args, steps: int, num_pairs: int, rate: float) -> list[list[str]]:
    """The rows of one T and M."""
    plain = Problem(args, num_pairs, own_activations=False)
    lean = Problem(args, num_pairs)
    ways = {} if args.no_unroll else {"full unroll": lambda: plain.unroll(steps)}
    if not args.no_whole:
        ways["ours"] = lambda: lean.ours(steps)
    for graphs in args.keep_graphs:
        ways[f"ours, {graphs} graphs kept"] = lambda graphs=graphs: lean.ours(steps, keep=Keep(graphs))
    for chunk in args.pair_chunk:
        ways[f"ours, chunks of {chunk}"] = lambda chunk=chunk: lean.ours(steps, chunk)
    if args.heads and not args.no_unroll:
        repeated = Problem(args, num_pairs, every_step=True)
        ways["encoder in every step"] = lambda: repeated.ours(steps, (args.pair_chunk or [None])[0])
    if args.lora_rank:
        whole = Problem(args, num_pairs, adapted=False)
        ways["ours, all weights"] = lambda: whole.ours(steps)
    if "bf16" in args.precision:
        half = Problem(args, num_pairs, bf16=True)
        ways["ours, bf16"] = lambda: half.ours(steps)
    if "tf32" in args.precision:
        ways["ours, tf32"] = lambda: in_tf32(lean, steps)
    exact = Problem(args, num_pairs, torch.float64).ours(steps) if args.float64 else None
    gradients = {way: call() for way, call in ways.items()}
    peaks = {way: peak_memory(call, args.device) for way, call in ways.items()}
    seconds = dict(zip(ways, alternate(list(ways.values()), args.repeats, args.device), strict=True))
    reference = gradients[next(iter(ways))]
    rows = []
    for way, call in ways.items():
        # Beside the one in use; on a GPU they lie in the host's memory.
        stored = (steps - 1) * plain.bytes if way != "full unroll" and args.device.type == "cpu" else 0
        operations = count_operations(call)
        rows.append(
            [
                *(str(steps), str(num_pairs), way, f"{seconds[way]:.2f}", f"{peaks[way] / 1e9:.3f}"),
                f"{(peaks[way] - stored) / 1e9:.3f}",
                *(agreement(gradients[way], reference) if way != "ours, all weights" else ("", "")),
                *(agreement(gradients[way], exact) if exact and way != "ours, all weights" else ("", "")),
                *(f"{operations / 1e9:.1f}", f"{operations / seconds[way] / rate:.2f}"),
            ]
        )
    return rows


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--image_encoder", default="test_nfnet", help="a timm model, random weights")
    add("--image_size", type=int, default=64, help="side of the input in pixels")
    add("--text_dim", type=int, default=768, help="width of the text embeddings")
    add("--pairs", type=int, nargs="+", default=[16], help="numbers of pairs M, all of them in every step")
    add("--steps", type=int, nargs="+", default=[2, 4, 8], help="numbers of student steps T")
    add("--pair_chunk", type=int, nargs="*", default=[], help="chunk sizes to run besides")
    add("--keep_graphs", type=int, nargs="*", default=[], help="numbers of last steps' graphs to keep, to run besides")
    add("--no_unroll", action="store_true", help="leave out what is compared with, where it takes too long")
    add("--no_whole", action="store_true", help="leave out all pairs at a time, where they do not fit")
    add(
        "--precision", nargs="*", default=[], choices=("bf16", "tf32"), help="to run besides; on a CPU tf32 is emulated"
    )
    add("--float64", action="store_true", help="also compare with float64")
    add("--heads", action="store_true", help="a frozen encoder and a projection on each side")
    add("--lora_rank", type=int, help="train low-rank updates of the image encoder in its place")
    add("--lora_layers", help="which layers they update")
    add("--lr_img", type=float, help="rate of the image tower")
    add("--lr_txt", type=float, help="rate of the text tower")
    add("--temperature", type=float, help="of the contrastive loss")
    add("--repeats", type=int, default=5, help="times are medians of so many")
    add("--device", type=torch.device, default="cuda" if torch.cuda.is_available() else "cpu")
    parser.set_defaults(**PLAIN)
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    torch.backends.cudnn.allow_tf32 = False
    adapted = f", adapters of rank {args.lora_rank} on {args.lora_layers}" if args.lora_rank else ""
    adapted += ", frozen, with heads" if args.heads else ""
    print(f"{args.image_encoder}{adapted}, {args.image_size} px; {describe_machine(args.device)}\n")
    rate = matrix_rate(args.device)
    rows = [row for pairs in args.pairs for steps in args.steps for row in measure(args, steps, pairs, rate)]
    print(table(HEAD, rows))


if __name__ == "__main__":
    main()
