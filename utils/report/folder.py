"""What a run folder holds that a page is made from: its sets, and what it wrote to metrics.jsonl, by iteration."""

import json
from dataclasses import dataclass, field
from pathlib import Path

from data.errors import InputError
from utils.sets import SynSet, load_synset

FIRST = "iteration_000000.safetensors"
KNOWN = "report.json"
VERSION = 1  # of report.json; one of another version is made anew


@dataclass
class History:
    """Lines of metrics.jsonl by iteration; where an iteration was done again, the later one.

    Attributes:
        evaluations: recalls on validation.
        iterations: losses, rates and gradient norms.
        lost: number of lines that could not be read.
    """

    evaluations: dict[int, dict] = field(default_factory=dict)
    iterations: dict[int, dict] = field(default_factory=dict)
    lost: int = 0

    def best(self) -> int | None:
        """The iteration of the highest mean recall, the first of several."""
        recall = {step: line["r_mean"] for step, line in sorted(self.evaluations.items())}
        return max(recall, key=recall.get) if recall else None


def read_history(path: Path) -> History:
    """Reads metrics.jsonl; an empty history if there is none. A line that was cut short is left out and counted."""
    history = History()
    for text in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []:
        try:
            line = json.loads(text)
            step = line["step"]
        except (ValueError, TypeError, KeyError):
            history.lost += 1
            continue
        if "Grand_Loss" in line:
            history.iterations[step] = line
        elif "r_mean" in line:
            history.evaluations[step] = line
    return history


def series(lines: dict[int, dict], name: str, against: str = "step") -> tuple[list[float], list[float]]:
    """Values of `against` and of `name`, in the order of iterations; lines that lack one of them are left out."""
    kept = [line for _, line in sorted(lines.items()) if line.get(name) is not None and line.get(against) is not None]
    return [line[against] for line in kept], [line[name] for line in kept]


def first_and_shown(folder: Path) -> tuple[SynSet | None, SynSet]:
    """The first state of a run, None if it is not there or unreadable, and the set that the report shows.

    That is the best set by validation; the last one as long as the best is the first.

    Raises:
        InputError: the folder holds neither of these two.
    """
    first = first_state(folder / "best.safetensors")
    best, last = (try_load(folder / f"{name}.safetensors") for name in ("best", "last"))
    if best is None and last is None:
        raise InputError(f"{folder} holds no set to report on, neither best.safetensors nor last.safetensors")
    if best is None or (last is not None and not best.settings.get("iteration")):
        return first, last
    return first, best


def first_state(path: Path) -> SynSet | None:
    """The first state of the run that the set in file `path` comes from, if it lies beside it and can be read."""
    return try_load(path.parent / FIRST)


def try_load(path: Path) -> SynSet | None:
    try:
        return load_synset(path)
    except InputError:
        return None


def read_known(folder: Path) -> dict:
    """What earlier reports of the run wrote to report.json; nothing if it is missing, damaged or of another version."""
    try:
        known = json.loads((folder / KNOWN).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return known if isinstance(known, dict) and known.get("version") == VERSION else {}
