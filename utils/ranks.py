"""The processes that torchrun started together: their group, what is dealt to them, and how they end.

Each is a rank; the ranks run the same program on the same command line. Rank 0 alone prints to stdout, draws, logs and
writes what the run shares. Without torchrun, or with one process, there is one rank, no process group, and every
function here does what one process does.

All ranks end together. Who must stop prints one line, unless another rank has, and exits; torchrun then sends SIGTERM
to the others of its machine, and those of other machines find the connection closed. Folders are expected to be shared
between machines.
"""

import contextlib
import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from data.errors import InputError
from utils.device import is_out_of_memory

TENSOR_WAIT = timedelta(minutes=10)  # for a tensor: the others are at the same line of the program
OBJECT_WAIT = timedelta(days=30)  # for an object: another rank may be training an expert
GRACE = 20  # seconds that a rank told to stop may take; torchrun kills after 30
STOPS = {signal.SIGINT, signal.SIGTERM}


class RankLost(InputError):
    """Another rank ended, or torchrun was told to stop this one."""

    def __init__(self):
        super().__init__(
            "a rank was lost or the run was told to stop; the same command goes on with what is there, "
            "distill.py with --resume"
        )


@dataclass
class _Group:
    """`store` is torchrun's and outlives every rank; `objects` is a group for objects and waiting, on CPUs."""

    rank: int
    count: int
    store: dist.Store
    objects: dist.ProcessGroup | None = None
    alone: bool = False
    bytes_sent: int = 0


_group: _Group | None = None


def start() -> None:
    """Joins the process group if torchrun started this process with others. Once; later calls do nothing."""
    global _group
    if _group is not None or not dist.is_torchelastic_launched() or os.environ["WORLD_SIZE"] == "1":
        return
    store, rank, count = next(dist.rendezvous("env://"))
    _group = _Group(rank, count, store)
    _stop_on_signals()
    if rank > 0:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115, until the process ends
    warnings.filterwarnings(
        "ignore", message="CUDA reports that you have"
    )  # fork_rng: states of all cards are few bytes
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    with _lost_if_it_fails():
        dist.init_process_group(backend, store=store, rank=rank, world_size=count, timeout=TENSOR_WAIT)
        _group.objects = dist.new_group(backend="gloo", timeout=OBJECT_WAIT)


def end() -> None:
    """Leaves the group when all ranks do. Not after an error: then the process just ends."""
    if _group is not None:
        wait()
        dist.destroy_process_group()


def count() -> int:
    """The number of ranks; 1 without a group and within `alone`."""
    return 1 if _group is None or _group.alone else _group.count


def rank() -> int:
    """This process's number, from 0."""
    return 0 if _group is None else _group.rank


def is_first() -> bool:
    return rank() == 0


def device(name: str) -> torch.device:
    """The device of --device for this rank: "cuda" is the card of the rank's number on its machine.

    Raises:
        InputError: `name` is one card, and there are several ranks.
    """
    if _group is None or not name.startswith("cuda"):
        return torch.device(name)
    if name != "cuda":
        raise InputError(f"--device {name} is one card and each rank has its own; give --device cuda")
    own = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(own)
    return own


@contextmanager
def alone() -> Iterator[None]:
    """Within it this rank works as one process does, and may do what the others do not."""
    was_alone = _group is None or _group.alone
    if not was_alone:
        _group.alone = True
    try:
        yield
    finally:
        if not was_alone:
            _group.alone = False


@contextmanager
def first_goes_first() -> Iterator[None]:
    """Rank 0 runs the block before the others do: what it leaves in a cache is made once."""
    if rank() > 0:
        wait()
    yield
    if rank() == 0:
        wait()


def wait() -> None:
    """Until all ranks are here."""
    gather(None)


def gather(value) -> list:
    """Every rank's picklable `value`, by rank, on every rank."""
    if count() == 1:
        return [value]
    values = [None] * count()
    with _lost_if_it_fails():
        dist.all_gather_object(values, value, group=_group.objects)
    return values


def spread(call: Callable, items: Sequence, title: str | None = None) -> list:
    """[call(item) for item in items] on every rank, where each call is made by one of them; the last one by rank 0.

    Within a call there is one rank. `title` is that of a progress bar over this rank's calls; None for none.
    """
    ranks, own, last = count(), rank(), len(items) - 1
    numbers = [i for i in range(len(items)) if ranks == 1 or (last - i) % ranks == own]  # 1: of one that is alone too
    bar = tqdm(numbers, desc=title, leave=False, disable=None if title else True, position=own)
    if ranks == 1:
        return [call(items[i]) for i in bar]
    with alone():
        made = {i: call(items[i]) for i in bar}
    by_number = {i: result for part in gather(made) for i, result in part.items()}
    return [by_number[i] for i in range(len(items))]


def share_of(number: int, of_rank: int | None = None) -> range:
    """The part of range(number) that falls to this rank, or to `of_rank`: one run, as long as the others' within 1."""
    of_rank = rank() if of_rank is None else of_rank
    return range(number) if count() == 1 else range(number * of_rank // count(), number * (of_rank + 1) // count())


def gather_rows(rows: Tensor, sizes: Sequence[int]) -> Tensor:
    """All ranks' rows below each other [sum(sizes), …]; rank r gives [sizes[r], …]."""
    sent = rows.new_zeros(max(sizes), *rows.shape[1:])
    sent[: len(rows)] = rows
    parts = [torch.empty_like(sent) for _ in sizes]
    with _lost_if_it_fails():
        dist.all_gather(parts, sent)
    _group.bytes_sent += (len(sizes) - 1) * sent.nbytes
    return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])


def add_up(tensors: Sequence[Tensor]) -> None:
    """Puts the sum over the ranks into each tensor, all in one message; the same on every rank, bit by bit."""
    begin_to_add_up(tensors)()


def begin_to_add_up(tensors: Sequence[Tensor]) -> Callable[[], None]:
    """Begins `add_up`; the function that it returns waits and puts the sums there."""
    if count() == 1:
        return lambda: None
    flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
    with _lost_if_it_fails():
        work = dist.all_reduce(flat, async_op=True)
    _group.bytes_sent += 2 * (_group.count - 1) * flat.nbytes // _group.count

    def finish() -> None:
        with _lost_if_it_fails():
            work.wait()
        _spread_out(flat, tensors)

    return finish


def take_from_first(tensors: Sequence[Tensor]) -> None:
    """Gives the tensors the values that they have on rank 0, where others may have computed them a bit differently."""
    if count() == 1:
        return
    flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
    with _lost_if_it_fails():
        dist.broadcast(flat, 0)
    _group.bytes_sent += flat.nbytes
    _spread_out(flat, tensors)


def _spread_out(flat: Tensor, tensors: Sequence[Tensor]) -> None:
    for tensor, part in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
        tensor.copy_(part.view(tensor.shape))


def bytes_sent() -> int:
    """What this rank has sent of tensors, if every sum goes round a ring and every gathered part goes to each rank."""
    return 0 if _group is None else _group.bytes_sent


def fail(line: str, code: int) -> int:
    """Prints the line with which a run ends on stderr, unless another rank has printed one; returns the exit code.

    Only rank 0, which has a log to close, does return: on a card, what is left of the group may never end by itself.
    """
    is_new = True
    if _group is not None:
        with contextlib.suppress(RuntimeError):  # the store is gone: torchrun itself was killed
            is_new = _group.store.add("failed", 1) == 1
    if is_new:
        print(line, file=sys.stderr, flush=True)
    if rank() > 0:
        os._exit(code)
    return code


@contextmanager
def _lost_if_it_fails() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:  # all that gloo and NCCL raise
        if is_out_of_memory(error):
            raise
        raise RankLost from error


def _stop_on_signals() -> None:
    """The first SIGINT or SIGTERM raises in the main thread; torchrun sends several. A thread ends what does not end.

    The main thread may be within a call of NCCL or of a kernel that never returns when another rank is gone, and
    Python's handlers wait for it.
    """

    def raise_once(number, _):
        for stop in STOPS:
            signal.signal(stop, signal.SIG_IGN)
        raise KeyboardInterrupt if number == signal.SIGINT else RankLost

    for stop in STOPS:
        signal.signal(stop, raise_once)
    told, tell = os.pipe()
    os.set_blocking(tell, False)
    signal.set_wakeup_fd(tell, warn_on_full_buffer=False)
    threading.Thread(target=_end_when_told, args=(told,), daemon=True).start()


def _end_when_told(told: int) -> None:
    number = 0
    while number not in STOPS:
        (number,) = os.read(told, 1)
    time.sleep(GRACE)
    os._exit(fail(*(("interrupted", 130) if number == signal.SIGINT else (f"error: {RankLost()}", 2))))
