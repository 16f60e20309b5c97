"""What the next iteration needs from the disk, read while the current one runs."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch


class Prefetch:
    """Calls read(iteration) in a thread, one iteration ahead. An exception in it is raised by `take`.

    Args:
        read: function of the iteration's number alone.
        end: iterations from here on are not read ahead.
    """

    def __init__(self, read: Callable[[int], object], end: int):
        self.read, self.end = read, end
        self.executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="prefetch")
        self.ahead = {}

    def close(self) -> None:
        """Waits for what is being read and forgets it."""
        self.executor.shutdown(cancel_futures=True)

    def take(self, iteration: int):
        """read(iteration), from the thread if it was read ahead; starts reading the next one."""
        future = self.ahead.pop(iteration, None) or self.executor.submit(self.read, iteration)
        result = future.result()
        if iteration + 1 < self.end:
            self.ahead[iteration + 1] = self.executor.submit(self.read, iteration + 1)
        return result


def prepare(snapshot: dict[str, torch.Tensor], device: torch.device) -> dict[str, torch.Tensor]:
    """The snapshot in the memory layout of the models, and where a GPU can fetch it without waiting."""
    snapshot = {n: v.to(memory_format=torch.channels_last) if v.ndim == 4 else v for n, v in snapshot.items()}
    return {n: v.pin_memory() for n, v in snapshot.items()} if device.type == "cuda" else snapshot


def to_device(snapshot: dict[str, torch.Tensor], device: torch.device) -> dict[str, torch.Tensor]:
    return {name: value.to(device, non_blocking=True) for name, value in snapshot.items()}
