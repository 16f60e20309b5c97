"""Rates for sets of pairs, chosen on validation from the same candidates for every set of a table."""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

from data.errors import InputError
from utils import ranks
from utils.scoring.tables import rates_text
from utils.scoring.training import NonFiniteLoss

TOWERS = {"image": "--grid_img", "text": "--grid_txt"}
EXTENSIONS = 1  # times that a grid is extended where a set does best at its edge


class Rates(NamedTuple):
    """What the two towers train with."""

    image: float
    text: float


def choose_rates(
    own: dict[str, Rates | None], grids: tuple[Sequence[float], Sequence[float]], recall: Callable[[str, Rates], float]
) -> tuple[dict[str, Rates], list[str]]:
    """The best rates of each set by its name, and lines about what did not go well.

    Candidates are each pair of the two grids and the own rates of all sets, the same for every set. Where a set does
    best at the edge of a grid of several values, that grid gets one more value there, for all sets.

    Args:
        own: each set's own rates; None where it has none.
        grids: image rates and text rates.
        recall: of a network trained on the set of this name with these rates; the ranks share the calls.

    Raises:
        InputError: no candidate of a set gives a finite loss.
    """
    grids = [sorted(set(grid)) for grid in grids]
    found: dict[str, dict[Rates, float]] = {name: {} for name in own}
    lines = []
    for extension in range(EXTENSIONS + 1):
        candidates = dict.fromkeys([*filter(None, own.values()), *itertools.starmap(Rates, itertools.product(*grids))])
        new = [(name, rates) for name in own for rates in candidates if rates not in found[name]]
        recalls = ranks.spread(lambda candidate: _finite(recall, *candidate), new, "search for rates")
        for (name, rates), value in zip(new, recalls, strict=True):
            found[name][rates] = value
            if value == -math.inf:
                lines.append(f"{name}: rates of {rates_text(rates)} diverge and are left out")
        best = {name: max(values, key=values.get) for name, values in found.items()}
        for name, rates in best.items():
            if found[name][rates] == -math.inf:
                raise InputError(f"{name} diverges at every candidate rate; give smaller --grid_img and --grid_txt")
        if extension < EXTENSIONS:
            grids = [_extended(grid, won) for grid, won in zip(grids, zip(*best.values(), strict=True), strict=True)]
    return best, lines + [line for name, rates in best.items() for line in _edge_lines(name, rates, grids)]


def _finite(recall, name: str, rates: Rates) -> float:
    try:
        return recall(name, rates)
    except NonFiniteLoss:
        return -math.inf


def _edge(rate: float, grid: list[float]) -> int:
    """-1 at the lowest value of a grid or below, 1 at the highest or above, else 0; 0 for a grid of one value."""
    if len(grid) == 1:
        return 0
    return -1 if rate <= grid[0] else int(rate >= grid[-1])


def _extended(grid: list[float], won: Sequence[float]) -> list[float]:
    """The grid with a value beyond the lowest and the highest rate that won, where these are at its edges or beyond."""
    low, high = min(won), max(won)
    below = [float(f"{low * grid[0] / grid[1]:.4g}")] if _edge(low, grid) < 0 else []
    above = [float(f"{high * grid[-1] / grid[-2]:.4g}")] if _edge(high, grid) > 0 else []
    return [*below, *grid, *above]


def _edge_lines(name: str, rates: Rates, grids: list[list[float]]) -> list[str]:
    return [
        f"{name}: its best {tower} rate, {rate:.3g}, is at the edge of what was tried, {grid[0]:.3g} to {grid[-1]:.3g};"
        f" give a wider {flag}"
        for (tower, flag), rate, grid in zip(TOWERS.items(), rates, grids, strict=True)
        if _edge(rate, grid)
    ]
