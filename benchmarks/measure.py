"""Time, peak memory and arithmetic of a call, and Markdown tables of them."""

import gc
import os
import statistics
import time
from collections.abc import Callable, Sequence

import torch
from torch.profiler import ProfilerActivity
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler otherwise reports each start on stderr


def peak_memory(call: Callable, device: torch.device) -> int:
    """Bytes of tensors that `call` holds at its peak beyond those that lived before.

    On CUDA from the allocator's own count. On a CPU from the sum of what torch's allocator gave and got back, as its
    profiler records it at every change; scratch memory inside a library's operation is not in it.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with torch.profiler.profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profile:
        call()
    events, changes = profile.profiler.kineto_results.experimental_event_tree(), []
    while events:
        event = events.pop()
        events.extend(event.children)
        if event.name == "[memory]":
            changes.append((event.start_time_ns, event.extra_fields.total_allocated, event.extra_fields.alloc_size))
    before = min(changes)[1] - min(changes)[2]
    return max(total for _, total, _ in changes) - before


def alternate(calls: Sequence[Callable], repeats: int, device: torch.device) -> list[float]:
    """Median seconds of each call, taken in turns so that a slow moment meets all of them."""
    seconds = [[] for _ in calls]
    for _ in range(repeats):
        for call, taken in zip(calls, seconds, strict=True):
            start = now(device)
            call()
            taken.append(now(device) - start)
    return [statistics.median(taken) for taken in seconds]


def now(device: torch.device) -> float:
    """Seconds on a clock, when the device has done all it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def count_operations(call: Callable) -> int:
    """Floating-point operations of the matrix products and convolutions in `call`."""
    with _Counter() as counter:
        call()
    return counter.operations


class _Counter(TorchDispatchMode):
    """FlopCounterMode refuses a gradient of a gradient; its formulas serve here."""

    operations = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func._overloadpacket in flop_registry:
            self.operations += flop_registry[func._overloadpacket](*args, **(kwargs or {}), out_val=result)
        return result


class Tf32(TorchDispatchMode):
    """Where there is no tensor core: rounds the operands of products and convolutions to TF32's 10 bits of mantissa."""

    PRODUCTS = {
        *(torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.bmm, torch.ops.aten.baddbmm),
        *(torch.ops.aten.convolution, torch.ops.aten.convolution_backward),
    }

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func._overloadpacket in self.PRODUCTS:
            args = [self._round(a) if isinstance(a, torch.Tensor) and a.ndim > 1 else a for a in args]
        return func(*args, **(kwargs or {}))

    def _round(self, value: torch.Tensor) -> torch.Tensor:
        return ((value.view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)


def matrix_rate(device: torch.device, dtype: torch.dtype = torch.float32, size: int | None = None) -> float:
    """Floating-point operations per second of a product of two square matrices, large ones if no size is given."""
    size = size or (8192 if device.type == "cuda" else 1024)
    left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    (seconds,) = alternate([lambda: left @ right], 7, device)
    return 2 * size**3 / seconds


def describe_machine(device: torch.device) -> str:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} thread(s)"
    return f"{name}, torch {torch.__version__}, {matrix_rate(device) / 1e9:.0f} GFLOP/s in a float32 matrix product"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(line) + " |" for line in [head, ["---"] * len(head), *rows])
