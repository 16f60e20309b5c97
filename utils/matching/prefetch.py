"""What the next iteration needs from the disk, read while the current one runs."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor


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
