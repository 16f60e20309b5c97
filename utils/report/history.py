"""What a run wrote to metrics.jsonl, by iteration."""

import json
from dataclasses import dataclass, field
from pathlib import Path


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
