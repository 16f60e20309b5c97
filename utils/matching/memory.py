"""How many pairs fit into a GPU's memory at a time, and what to say when they do not."""

from collections.abc import Callable

import torch
from tqdm import tqdm

from data.errors import InputError
from utils import ranks
from utils.device import is_out_of_memory
from utils.sets import Pairs
from utils.student import matching_gradient

CPU_PICTURES = 20  # 100 pictures of 160 px through MobileNetV1: half the time of 12 or 50 at a time
TRIAL_STEPS = 3  # the first, one whose θ_t comes from the host, and the last: more steps take no more memory
SHARE = 0.85  # of the free memory is planned with; convolutions choose other workspaces for other sizes


class OutOfMemory(InputError):
    """The GPU's memory is full; the text says which flag to change."""


def guarded(call: Callable, advice: Callable[[], str]):
    """call(), with `OutOfMemory` in place of CUDA's errors, raised when the memory of `call` is free again."""
    try:
        return call()
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        # The error holds all frames that were running, until this block is left.
    torch.cuda.empty_cache()
    raise OutOfMemory(f"CUDA is out of memory; {advice()}")


def pair_chunk_advice(pairs_at_a_time: int) -> str:
    if pairs_at_a_time == 1:
        return "with --pair_chunk 1 already; give a lower --image_size or a smaller --image_encoder"
    return f"give --pair_chunk {pairs_at_a_time // 2}"


class PairChunk:
    """How many pairs of a student's step are in memory at a time; halved when a GPU's memory is full.

    Args:
        size: None for all pairs.
        may_shrink: otherwise full memory is an error, as where --pair_chunk is given.
    """

    def __init__(self, size: int | None, may_shrink: bool):
        self.size, self.may_shrink = size, may_shrink

    def fit(self, call: Callable, batch_size: int):
        """call(pair_chunk=…) at the present size, or at the first half of it, quarter … that fits.

        Raises:
            OutOfMemory: a single pair does not fit, the size may not shrink, or there are several ranks.
        """
        while True:
            size = min(self.size or batch_size, batch_size)
            try:
                return guarded(
                    lambda: call(pair_chunk=self.size),
                    lambda size=size: pair_chunk_advice(size),
                )
            except OutOfMemory:
                # One rank alone cannot change its chunk: the others wait for its part of the old one.
                if not self.may_shrink or size == 1 or ranks.count() > 1:
                    raise
            self.size = size // 2
            tqdm.write(f"CUDA is out of memory with {size} pairs at a time; going on with {self.size}")


def fit_pair_chunk(loss_fn, params: dict, pairs: Pairs, batch_size: int, **student) -> int | None:
    """The largest `pair_chunk` for the free memory of the pairs' GPU, by two short trials; None if all pairs fit.

    Over ranks, of the smallest GPU, where only a rank's share of the pairs must fit. On a CPU always None, but
    `CPU_PICTURES` where a frozen encoder sees each picture once: few fit its caches.

    Args:
        params: the student's parameters by name, on the GPU.
        batch_size: pairs in a student's step; a frozen encoder embeds those of all steps at once.
        student: keyword arguments of `matching_gradient`.
    """
    batch_size = -(-(len(pairs.image_syn) if loss_fn.frozen_encoder is not None else batch_size) // ranks.count())
    with ranks.alone():
        chunk = _fit_pair_chunk(loss_fn, params, pairs, batch_size, **student)
    return min((found for found in ranks.gather(chunk) if found is not None), default=None)


def _fit_pair_chunk(loss_fn, params: dict, pairs: Pairs, batch_size: int, **student) -> int | None:
    device = pairs.image_syn.device
    if device.type != "cuda":
        return CPU_PICTURES if loss_fn.frozen_encoder is not None else None

    def peak(size: int) -> int:
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        batches = [torch.arange(min(2 * size, batch_size))] * TRIAL_STEPS
        matching_gradient(
            loss_fn, start=params, target=params, pairs=pairs, batches=batches, seed=0, pair_chunk=size, **student
        )
        return torch.cuda.max_memory_allocated(device) - before

    small, large = min(2, batch_size), min(4, batch_size)
    guarded(lambda: peak(small), lambda: pair_chunk_advice(1))  # the first run also loads kernels
    peaks = [guarded(lambda size=size: peak(size), lambda: pair_chunk_advice(1)) for size in (small, large)]
    torch.cuda.empty_cache()
    free = free_memory(device)
    snapshots = 2 * sum(value.nbytes for value in params.values())  # of the expert, which the trials did without
    chunk = plan_pair_chunk((small, large), peaks, free - snapshots, batch_size)
    shown = "all pairs" if chunk is None else f"{chunk} pairs (--pair_chunk {chunk})"
    print(f"{shown} at a time, for {free / 1e9:.1f} GB of free GPU memory")
    return chunk


def free_memory(device: torch.device) -> int:
    """Bytes that this process may still take of a GPU: what is free there, within its share of the whole, if limited.

    See `torch.cuda.set_per_process_memory_fraction`.
    """
    free, total = torch.cuda.mem_get_info(device)
    share = int(torch.cuda.get_per_process_memory_fraction(device) * total)
    return max(0, min(free, share - torch.cuda.memory_reserved(device)))


def plan_pair_chunk(sizes: tuple[int, int], peaks: list[int], free: int, batch_size: int) -> int | None:
    """The chunk that takes `SHARE` of `free` bytes, if `peaks` at two `sizes` grow on in a straight line."""
    if sizes[0] == sizes[1]:
        return None
    per_pair = max(1, (peaks[1] - peaks[0]) / (sizes[1] - sizes[0]))
    fixed = max(0, peaks[0] - per_pair * sizes[0])
    chunk = max(1, int((SHARE * free - fixed) / per_pair))
    return None if chunk >= batch_size else chunk
