"""What an outer iteration asks of a card, and where its time goes there.

`Asked` counts operations, launches and copies of any block. The section tells kernels by name and by kind, and when the
card had nothing to do.
"""

import contextlib
import json
import re
import tempfile
from collections import defaultdict
from pathlib import Path

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, supported_activities
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from benchmarks.gpu.setup import Setup, products_in
from benchmarks.measure import now

# An RTX 3090 on paper: dense products (twice these numbers count sparsity), bytes a second of its memory and over
# PCIe 4; and the seconds that a host usually takes from one launch to the next.
TF32, BF16, MEMORY, PCIE, LAUNCH = 35.6e12, 71e12, 936e9, 25e9, 5e-6
ESTIMATE = (
    "The time on an RTX 3090 is an estimate, not a measurement, and rather too short: max(A, launches × 5 µs) + copied "
    "GB / 25 GB/s. A is the sum over all operations of the larger of arithmetic / 35.6 TFLOP/s (71 in bf16) and bytes "
    "of operands and results / 936 GB/s, as if each ran alone and at the card's rates on paper. One iteration more is "
    "taken for the counts, which is not in the times."
)

LONGEST = 10
KINDS = {
    "copies": r"memcpy|memset",
    "products and convolutions": r"gemm|conv|xmma|cutlass|cudnn|fprop|dgrad|wgrad|::mm|addmm|bmm",
    "reductions and norms": r"reduce|norm|softmax|\bsum\b|mean",
    "element by element": r"elementwise|foreach|multi_tensor|add|mul|fill|index|copy",
}


class Asked:
    """What a block asks of the setup's device: `with Asked(setup) as asked: ...`, then `asked.columns`.

    Operations and bytes are counted in the thread of the block and in those of its gradients; launches and copies, on a
    card alone, are all that the card was asked for.
    """

    def __init__(self, setup: Setup):
        self.setup, self.counter, self.copied, self.recorded = setup, Counter(setup.device), {}, None

    def __enter__(self):
        self.stack = contextlib.ExitStack()
        if self.setup.on_card and ProfilerActivity.CUDA in supported_activities():
            self.recorded = self.stack.enter_context(profile(activities=[ProfilerActivity.CUDA]))
            self.stack.callback(now, self.setup.device)  # before the profiler's end
        self.stack.enter_context(self.counter)
        return self

    def __exit__(self, *error):
        self.stack.__exit__(*error)
        if self.recorded and error == (None, None, None):
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder) / "trace.json"
                self.recorded.export_chrome_trace(str(path))
                self.copied = of_trace(json.loads(path.read_text(encoding="utf-8", errors="replace"))["traceEvents"])

    def columns(self, seconds: float) -> dict:
        """For a row of a block that takes so long; "-" for what could not be counted."""
        counter, rate = self.counter, self.setup.rate("tf32")
        estimate = "-"
        if self.copied:
            to_card, to_host, launches = self.copied.values()
            estimate = max(counter.seconds, launches * LAUNCH) + (to_card + to_host) * 1e9 / PCIE
        return {
            **(self.copied or dict.fromkeys(of_trace([{"cat": "kernel"}]), "-")),
            "TFLOP": counter.operations / 1e12,
            "GB read and written": counter.bytes / 1e9,
            "share of tf32 rate": counter.operations / seconds / rate,
            "s on an RTX 3090, estimated": estimate,
        }


def asked_of(setup: Setup, call, seconds: float) -> dict:
    """The columns of `Asked` for a call that takes so long."""
    with Asked(setup) as asked:
        call()
    return asked.columns(seconds)


class Counter(TorchDispatchMode):
    """Counts operations of products and convolutions, and bytes that operations on a device read and write.

    Attributes:
        operations: floating-point operations.
        bytes: of operands and results, each operation's alone.
        seconds: an RTX 3090's for all operations, each as long as its arithmetic or its bytes take on paper.
    """

    NO_WORK = re.compile(r"empty|new_empty|_unsafe_view")

    def __init__(self, device: torch.device):
        super().__init__()
        self.device, self.operations, self.bytes, self.seconds = device, 0, 0, 0.0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func.is_view or self.NO_WORK.match(func._opname) or not self._tensors(result):
            return result
        tensors = self._tensors((args, kwargs, result))
        # Of an expanded tensor only what is stored, of a slice only what it shows.
        moved = sum(min(tensor.nbytes, tensor.untyped_storage().nbytes()) for tensor in tensors)
        operations = 0
        if func._overloadpacket in flop_registry:
            operations = flop_registry[func._overloadpacket](*args, **(kwargs or {}), out_val=result)
        rate = BF16 if tensors[0].dtype == torch.bfloat16 else TF32
        self.operations += operations
        self.bytes += moved
        self.seconds += max(operations / rate, moved / MEMORY)
        return result

    def _tensors(self, tree) -> list[torch.Tensor]:
        leaves = (leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor))
        return [tensor for tensor in leaves if tensor.device.type == self.device.type]


def of_trace(events: list[dict]) -> dict:
    """Columns of copies between host and card and of launches, from a profiler's trace; empty without a kernel."""
    launches = sum(event.get("cat") == "kernel" for event in events)
    copies = [event for event in events if event.get("cat") == "gpu_memcpy"]

    def gigabytes(way: str) -> float:
        return sum(event["args"]["bytes"] for event in copies if way in event["name"]) / 1e9

    columns = {"GB to card": gigabytes("HtoD"), "GB to host": gigabytes("DtoH"), "launches": launches}
    return columns if launches else {}


def where_the_time_goes(setup: Setup):
    yield "tf32, all at a time", lambda: measure(setup, None)


def measure(setup: Setup, chunk: int | None) -> dict:
    """Rows of one outer iteration in tf32; shares are of the time from the first kernel's start to the last's end."""
    problem, steps = setup.problem(), setup.sizes.steps
    activity = ProfilerActivity.CUDA if setup.on_card else ProfilerActivity.CPU
    with products_in("tf32"):
        problem.ours(steps, chunk)
        started = now(setup.device)
        problem.ours(steps, chunk)
        alone = now(setup.device) - started
        with profile(activities=[activity]) as recorded:
            problem.ours(steps, chunk)
            now(setup.device)
    wanted = DeviceType.CUDA if setup.on_card else DeviceType.CPU
    events = [
        (event.name(), event.start_ns(), event.start_ns() + event.duration_ns())
        for event in recorded.profiler.kineto_results.events()
        if event.device_type() == wanted
    ]
    if not events:
        raise RuntimeError("the profiler recorded no kernel; is its library allowed to see the card?")
    return {"the iteration, not recorded": {"ms": 1e3 * alone}, **describe(events)}


def describe(events: list[tuple[str, int, int]]) -> dict:
    """Rows from kernels as (name, start, end) in nanoseconds; those that run at once count once in busy and gaps."""
    spans = sorted((start, end) for _, start, end in events)
    whole = max(end for _, end in spans) - spans[0][0]
    gaps = find_gaps(spans)

    def cells(nanoseconds: int, calls: int) -> dict:
        return {"ms": nanoseconds / 1e6, "share": nanoseconds / whole, "calls": calls}

    rows = {"recorded": cells(whole, len(events)), "nothing runs": cells(sum(gaps), len(gaps))}
    rows["longest gap"] = cells(max(gaps, default=0), min(1, len(gaps)))
    by_kind, by_name = (_totals(events, key) for key in (kind_of, lambda name: name))
    rows |= {kind: cells(*by_kind[kind]) for kind in [*KINDS, "the rest"] if kind in by_kind}
    longest = sorted(by_name, key=by_name.get, reverse=True)[:LONGEST]
    return rows | {f"{n + 1}. {shorten(name)}": cells(*by_name[name]) for n, name in enumerate(longest)}


def find_gaps(spans: list[tuple[int, int]]) -> list[int]:
    """Lengths of the times that none of the spans, sorted by their start, covers."""
    gaps, until = [], spans[0][0]
    for start, end in spans:
        if start > until:
            gaps.append(start - until)
        until = max(until, end)
    return gaps


def _totals(events, key) -> dict[str, tuple[int, int]]:
    """Time and number of the events by `key` of their name."""
    totals = defaultdict(lambda: (0, 0))
    for name, start, end in events:
        time, calls = totals[key(name)]
        totals[key(name)] = time + end - start, calls + 1
    return totals


def kind_of(name: str) -> str:
    return next((kind for kind, words in KINDS.items() if re.search(words, name, re.IGNORECASE)), "the rest")


def shorten(name: str, length: int = 90) -> str:
    """A kernel's name without the arguments of its templates beyond `length` characters."""
    name = re.sub(r"^void |at::native::|\(anonymous namespace\)::", "", name)
    return name if len(name) <= length else name[: length - 1] + "…"
