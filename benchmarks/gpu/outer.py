"""The outer gradient on a card: its time and memory by precision, chunk and memory limit; agreement; other students.

Each section is a function from a `Setup` to (name, call) of its measurements; a call gives {row: {column: value}}.
What the calls of a section share lives as long as the section.
"""

import contextlib
import functools
from unittest import mock

import torch

from benchmarks.gpu.profile import asked_of
from benchmarks.gpu.setup import PRECISIONS, Setup, products_in
from benchmarks.measure import Tf32, alternate, count_operations
from benchmarks.outer_gradient import Problem, agreement
from utils.matching import Room, fit_room
from utils.student import LEAST
from utils.student import loss as student


def card(setup: Setup):
    """What the card can do, to compare with."""
    yield (
        "matrix product",
        lambda: {f"{precision} product": {"TFLOP/s": setup.rate(precision) / 1e12} for precision in PRECISIONS},
    )
    if setup.on_card:
        yield "memory", lambda: {"memory": {"GB": torch.cuda.mem_get_info(setup.device)[1] / 1e9}}
        yield "copies", lambda: {name: {"GB/s": rate} for name, rate in copy_rates(setup).items()}


def copy_rates(setup: Setup, megabytes: int = 512) -> dict[str, float]:
    """GB/s between pinned memory of the host and the card, and within the card, where each byte moves once."""
    on_host = torch.zeros(megabytes * 10**6, dtype=torch.uint8).pin_memory()
    on_card, other = (torch.zeros_like(on_host, device=setup.device) for _ in range(2))
    copies = {
        "host to card": (on_card, on_host),
        "card to host": (on_host, on_card),
        "within the card": (other, on_card),
    }
    seconds = alternate([lambda c=c: c[0].copy_(c[1], non_blocking=True) for c in copies.values()], 5, setup.device)
    return {name: megabytes / 1e3 / taken for name, taken in zip(copies, seconds, strict=True)}


def outer(setup: Setup, precision: str, others: bool = False):
    """Under each limit of memory with the chunk that is chosen by itself; `others`: other chunks without a limit."""
    problem = functools.cache(lambda: setup.problem(bf16=precision == "bf16"))

    def under_limit(gigabytes: int):
        setup.rate("tf32")  # before there is a limit
        with setup.limited_to(gigabytes), products_in(precision):
            room = chosen_room(problem(), setup.sizes.steps)
            how = f"{gigabytes} GB, {room.pair_chunk or 'all'} at a time"
            return {f"{precision}, {room.keep.graphs} graphs kept, {how}": iteration(setup, problem(), room)}

    def with_chunk(chunk: int | None, benchmark: bool = False):
        torch.backends.cudnn.benchmark = benchmark
        how = f"{', cudnn.benchmark' if benchmark else ''}, no limit, {chunk or 'all'} at a time"
        with products_in(precision):
            return {precision + how: iteration(setup, problem(), Room(chunk, LEAST))}

    if setup.on_card and not others:
        for gigabytes in setup.sizes.limits:
            yield f"{precision}, {gigabytes} GB", functools.partial(under_limit, gigabytes)
    else:
        for chunk in (None, *setup.sizes.chunks):
            yield f"{precision}, {chunk or 'all'} at a time", functools.partial(with_chunk, chunk)
        if setup.on_card:
            yield f"{precision}, cudnn.benchmark", functools.partial(with_chunk, setup.sizes.chunks[0], True)


def iteration(setup: Setup, problem: Problem, room: Room) -> dict:
    """Columns of an outer gradient in this room: time, memory, what it asks of the card."""

    def call():
        problem.ours(setup.sizes.steps, room.pair_chunk, room.keep)

    taken = setup.measured(call)
    return {**taken, **asked_of(setup, call, taken["s"])}


def chosen_room(problem: Problem, steps: int) -> Room:
    return fit_room(problem.loss_fn, problem.start, problem.pairs, len(problem.pairs.image_syn), steps)


def written_out(setup: Setup):
    """Our second derivatives of convolutions and standardised weights against torch's; two steps of 25 pairs."""
    pairs, steps = min(25, setup.sizes.pairs), min(2, setup.sizes.steps)

    def compare(encoder: str, own: bool, benchmark: bool) -> dict:
        torch.backends.cudnn.benchmark = benchmark
        how = ("written out" if own else "torch's") + (", cudnn.benchmark" if benchmark else "")
        chosen = contextlib.nullcontext() if own else mock.patch.object(student, "WrittenOut", contextlib.nullcontext)
        with chosen, products_in("tf32"):
            problem = setup.problem(pairs, image_encoder=encoder)
            taken = setup.measured(lambda: problem.ours(steps))
            done = count_operations(lambda: problem.ours(steps))
        torch.backends.cudnn.benchmark = False
        share = {"TFLOP": done / 1e12, "share of matrix rate": done / taken["s"] / setup.rate("tf32")}
        return {f"{encoder}, {how}": {**taken, **share}}

    for encoder in setup.sizes.convolutional:
        for benchmark in (False, True) if setup.on_card else (False,):
            for own in (True, False):
                name = f"{encoder}, own {own}, cudnn.benchmark {benchmark}"
                yield name, functools.partial(compare, encoder, own, benchmark)


def precisions(setup: Setup):
    """Agreement of each precision's gradient with that in float64, on few pairs."""
    few, steps = setup.sizes.exact_pairs, setup.sizes.steps
    exact = functools.cache(lambda: setup.problem(few, torch.float64).ours(steps))

    def compare(precision: str, chunk: int | None) -> dict:
        problem = setup.problem(few, bf16=precision == "bf16")
        emulated = Tf32() if precision == "tf32" and not setup.on_card else contextlib.nullcontext()
        with products_in(precision), emulated:
            gradient = problem.ours(steps, chunk)
        cells = {}
        for name, part in (("pictures", slice(0, 1)), ("texts", slice(1, 2))):
            error, cosine = agreement(gradient[part], exact()[part])
            cells |= {f"error of {name}": error, f"cosine of {name}": cosine}
        return {f"{precision}, {few} pairs, {chunk or 'all'} at a time": cells}

    for precision in PRECISIONS:
        for chunk in (None, (few + 1) // 2):
            yield f"{precision}, {chunk or 'all'} at a time", functools.partial(compare, precision, chunk)


def other_students(setup: Setup):
    """Heads over a frozen tower, and a transformer with adapters; tf32."""
    sizes = setup.sizes
    students = {
        f"heads over a frozen {sizes.encoder}": {"heads": True},
        f"{sizes.transformer}, adapters of rank 4": {"image_encoder": sizes.transformer, "lora_rank": 4},
    }

    def measure(name: str, changes: dict) -> dict:
        with products_in("tf32"):
            problem = setup.problem(**changes)
            room = chosen_room(problem, sizes.steps)
            return {f"{name}, {room.pair_chunk or 'all'} at a time": iteration(setup, problem, room)}

    for name, changes in students.items():
        yield name, functools.partial(measure, name, changes)
