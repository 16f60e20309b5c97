"""Where the time of an outer iteration goes: kernels by name and by kind, and when the card had nothing to do."""

import re
from collections import defaultdict

from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from benchmarks.gpu.setup import Setup, products_in
from benchmarks.measure import now

LONGEST = 10
KINDS = {
    "copies": r"memcpy|memset",
    "products and convolutions": r"gemm|conv|xmma|cutlass|cudnn|fprop|dgrad|wgrad|::mm|addmm|bmm",
    "reductions and norms": r"reduce|norm|softmax|\bsum\b|mean",
    "element by element": r"elementwise|foreach|multi_tensor|add|mul|fill|index|copy",
}


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
