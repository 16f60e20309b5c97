"""What memory has room for: pairs at a time, graphs that are kept; and what to say when it is full."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from tqdm import tqdm

from data.errors import InputError
from utils import ranks
from utils.device import is_out_of_memory
from utils.sets import Pairs
from utils.student import LEAST, Keep, graph_bytes, matching_gradient

CPU_PICTURES = 20  # 100 pictures of 160 px through MobileNetV1: half the time of 12 or 50 at a time
TRIAL_STEPS = 3  # the first, one whose θ_t comes from the host, and the last: more steps take no more memory
HOST_BYTES = 4e9  # of a CPU's memory, for graphs that are kept
PARAMS_SHARE = 0.1  # of a GPU's free memory
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


@dataclass(frozen=True)
class Room:
    """What memory has room for.

    Attributes:
        pair_chunk: pairs of a step that are in memory at a time; None for all.
        keep: what stays there for the way back.
    """

    pair_chunk: int | None
    keep: Keep = LEAST


class Fitting:
    """Calls with what memory has room for, which gets less when a GPU's memory is full.

    Args:
        room: that of the first call.
        may_shrink: otherwise full memory is an error, as where --pair_chunk is given.
    """

    def __init__(self, room: Room, may_shrink: bool):
        self.room, self.may_shrink = room, may_shrink

    def call(self, function: Callable, batch_size: int):
        """function(pair_chunk=…, keep=…) in the present room, or with the first half of the pairs, quarter … that fits.

        Chunks keep no graphs.

        Raises:
            OutOfMemory: a single pair does not fit, the room may not shrink, or there are several ranks.
        """
        while True:
            size = min(self.room.pair_chunk or batch_size, batch_size)
            try:
                return guarded(
                    lambda: function(pair_chunk=self.room.pair_chunk, keep=self.room.keep),
                    lambda size=size: pair_chunk_advice(size),
                )
            except OutOfMemory:
                # One rank alone cannot change its room: the others wait for its part of the old one.
                if not self.may_shrink or size == 1 or ranks.count() > 1:
                    raise
            self.room = Room(size // 2)
            tqdm.write(f"CUDA is out of memory with {size} pairs at a time; going on with {size // 2}")


def fit_room(loss_fn, params: dict, pairs: Pairs, batch_size: int, steps: int, **student) -> Room:
    """What the free memory has room for, by short trials; the same numbers come from every `Room`.

    On a GPU every θ_t stays if all of them take at most `PARAMS_SHARE` of what is free; then as many pairs at a time as
    fit; and if all do, the graphs of as many last steps. On a CPU all pairs, and graphs of at most `HOST_BYTES`, but
    `CPU_PICTURES` where a frozen encoder sees each picture once: few fit its caches. Over ranks, where only a rank's
    share of the pairs must fit, of the smallest GPU.

    Args:
        params: the student's parameters by name, where it is to run.
        batch_size: pairs in a student's step; a frozen encoder embeds those of all steps at once.
        steps: T.
        student: keyword arguments of `matching_gradient`.
    """
    batch_size = -(-(len(pairs.image_syn) if loss_fn.frozen_encoder is not None else batch_size) // ranks.count())
    find = _room_on_card if pairs.image_syn.is_cuda else _room_on_host
    with ranks.alone():
        room = find(loss_fn, params, pairs, batch_size, steps, **student)
    rooms = ranks.gather(room)
    chunk = min((found.pair_chunk for found in rooms if found.pair_chunk is not None), default=None)
    keeps = [found.keep for found in rooms]
    return Room(chunk, Keep(min(keep.graphs for keep in keeps), all(keep.params for keep in keeps)))


def _room_on_host(loss_fn, params: dict, pairs: Pairs, batch_size: int, steps: int, **student) -> Room:
    if loss_fn.frozen_encoder is not None:
        return Room(CPU_PICTURES)
    # The ranks of one machine share its memory.
    graph = graph_bytes(loss_fn, params, pairs, torch.arange(batch_size))
    return Room(None, Keep(plan_graphs(steps, graph, HOST_BYTES / ranks.count() - graph)))


def _room_on_card(loss_fn, params: dict, pairs: Pairs, batch_size: int, steps: int, **student) -> Room:
    device = pairs.image_syn.device

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
    bytes_of_params = sum(value.nbytes for value in params.values())
    keep_params = steps * bytes_of_params <= PARAMS_SHARE * free
    # Of the expert there are two snapshots, which the trials did without.
    room = free - (2 + steps * keep_params) * bytes_of_params
    chunk, spare = plan_pair_chunk((small, large), peaks, room, batch_size)
    graphs = 1
    if chunk is None and loss_fn.frozen_encoder is None:
        graph = guarded(
            lambda: graph_bytes(loss_fn, params, pairs, torch.arange(batch_size)),
            lambda: pair_chunk_advice(batch_size),
        )
        graphs = plan_graphs(steps, graph, spare)
    shown = "all pairs" if chunk is None else f"{chunk} pairs (--pair_chunk {chunk})"
    kept = f", graphs of {graphs} of {steps} steps kept" if graphs > 1 else ""
    print(f"{shown} at a time{kept}, for {free / 1e9:.1f} GB of free GPU memory")
    return Room(chunk, Keep(graphs, keep_params))


def plan_graphs(steps: int, graph: int, spare: float) -> int:
    """Of how many last steps the graph, of `graph` bytes, is kept, where `spare` bytes are left beside one of them."""
    return max(1, min(steps, 1 + int(spare // graph)))


def free_memory(device: torch.device) -> int:
    """Bytes that this process may still take of a GPU: what is free there, within its share of the whole, if limited.

    See `torch.cuda.set_per_process_memory_fraction`.
    """
    free, total = torch.cuda.mem_get_info(device)
    share = int(torch.cuda.get_per_process_memory_fraction(device) * total)
    return max(0, min(free, share - torch.cuda.memory_reserved(device)))


def plan_pair_chunk(sizes: tuple[int, int], peaks: list[int], free: int, batch_size: int) -> tuple[int | None, float]:
    """The chunk that takes `SHARE` of `free` bytes, None for the whole batch, and the bytes of it that are left.

    `peaks` at two `sizes` are taken to grow on in a straight line.
    """
    per_pair = max(1, (peaks[1] - peaks[0]) / max(1, sizes[1] - sizes[0]))
    fixed = max(0, peaks[0] - per_pair * sizes[0])
    chunk = max(1, int((SHARE * free - fixed) / per_pair))
    if chunk < batch_size and sizes[0] < sizes[1]:
        return chunk, 0
    return None, SHARE * free - fixed - per_pair * batch_size
