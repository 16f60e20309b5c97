"""The files of a run folder that a report is made from."""

import json
from pathlib import Path

from data.errors import InputError
from utils.synset import SynSet, load_synset

FIRST = "iteration_000000.safetensors"
KNOWN = "report.json"
VERSION = 1  # of report.json; one of another version is made anew


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
