"""What the sections of benchmarks/gpu/child.py share: sizes, precisions, limits of memory, and one measured call."""

import contextlib
import functools
import gc
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass

import torch

from benchmarks.measure import alternate, matrix_rate, now, peak_memory
from benchmarks.outer_gradient import PLAIN, Problem

PRECISIONS = ("tf32", "bf16", "fp32")


@dataclass(frozen=True)
class Sizes:
    """Of everything that is measured. The values here are the published ones, as far as there are any."""

    encoder: str = "nfnet_l0"
    convolutional: tuple[str, ...] = ("nfnet_l0", "mobilenetv2_100")
    transformer: str = "vit_base_patch16_224"
    image_size: int = 224
    text_dim: int = 768
    pairs: int = 100
    steps: int = 8
    chunks: tuple[int, ...] = (50, 25, 10)
    repeats: int = 2
    limits: tuple[int, ...] = (24, 12)  # GB
    exact_pairs: int = 8  # in float64
    batch: int = 128  # of an expert's step
    batches: int = 64
    pictures: int = 512
    eval_epochs: int = 50
    test_pictures: int = 1000
    iterations: int = 4  # of distill.py: one that loads kernels, two that are timed, one that is counted
    train_pictures: int = 200
    product: int = 8192  # side of the square matrices that the card's rate is measured with


TOY = Sizes(
    convolutional=("test_nfnet",),
    **{"encoder": "test_nfnet", "transformer": "test_vit", "image_size": 32, "text_dim": 16, "pairs": 4, "steps": 1},
    **{"chunks": (4,), "repeats": 1, "limits": (24, 12), "exact_pairs": 3, "product": 128},
    **{"batch": 4, "batches": 4, "pictures": 4, "eval_epochs": 2, "test_pictures": 12, "iterations": 3},
    train_pictures=12,
)


class Setup:
    """A device and the sizes to measure there; `problem` builds a student and its expert at them."""

    def __init__(self, device: torch.device, sizes: Sizes, num_workers: int):
        self.device, self.sizes, self.num_workers = device, sizes, num_workers
        self.on_card = device.type == "cuda"
        self.rate = functools.cache(self._rate)

    def arguments(self, **changes) -> Namespace:
        """As `outer_gradient.Problem` takes them."""
        sizes = self.sizes
        values = {"image_encoder": sizes.encoder, "image_size": sizes.image_size, "text_dim": sizes.text_dim}
        return Namespace(**{**PLAIN, **values, "device": self.device, **changes})

    def problem(self, num_pairs: int | None = None, dtype=torch.float32, bf16=False, **changes) -> Problem:
        return Problem(self.arguments(**changes), num_pairs or self.sizes.pairs, dtype, bf16)

    def _rate(self, precision: str) -> float:
        """Floating-point operations per second of a large matrix product."""
        types = {"bf16": torch.bfloat16, "fp64": torch.float64}
        with products_in(precision):
            return matrix_rate(self.device, types.get(precision, torch.float32), self.sizes.product)

    def measured(self, call: Callable) -> dict:
        """Seconds of a call, the median of some, and its peak memory: all tensors on a card, new ones on a CPU."""
        if self.on_card:
            call()  # loads kernels
        peaks = self._peaks(call)
        (seconds,) = alternate([call], self.sizes.repeats, self.device)
        return {"s": seconds, **peaks}

    def _peaks(self, call: Callable) -> dict:
        if not self.on_card:
            return {"peak GB": peak_memory(call, self.device) / 1e9}
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(self.device)
        call()
        return self.peaks_so_far()

    def peaks_so_far(self) -> dict:
        """Since the last reset of the card's peaks: of tensors, and of what torch took from the card for them."""
        now(self.device)
        allocated, reserved = (
            peak(self.device) / 1e9 for peak in (torch.cuda.max_memory_allocated, torch.cuda.max_memory_reserved)
        )
        return {"peak GB": allocated, "reserved GB": reserved}

    def free(self) -> None:
        """Everything as it was before a section: memory, its limit, precision."""
        gc.collect()
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
        torch.backends.cudnn.benchmark = False
        if self.on_card:
            with contextlib.suppress(RuntimeError):  # a card that has failed once fails here too
                torch.cuda.set_per_process_memory_fraction(1.0, self.device)
                torch.cuda.empty_cache()

    @contextlib.contextmanager
    def limited_to(self, gigabytes: float | None):
        """As if the card had so much memory for torch's tensors; None: all. Raises ValueError if it has less."""
        if gigabytes is None:
            yield
            return
        total = torch.cuda.get_device_properties(self.device).total_memory
        if gigabytes * 1e9 > total:
            raise ValueError(f"the card has {total / 1e9:.0f} GB")
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction(gigabytes * 1e9 / total, self.device)
        try:
            yield
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0, self.device)


@contextlib.contextmanager
def products_in(precision: str):
    """tf32 or not; bf16 is the model's own matter."""
    backends = torch.backends.cuda.matmul, torch.backends.cudnn
    for backend in backends:
        backend.allow_tf32 = precision == "tf32"
    try:
        yield
    finally:
        for backend in backends:
            backend.allow_tf32 = False
