"""docs/code.md names every file once, folders stay small, and no module imports from a room above its own."""

import ast
import os
import re
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs/code.md"
ENTRY = re.compile(r"^( *)(\S+?\.py|\S+/)(?:\s+\S.*)?$")
FOLDERS = ("utils", "networks", "data", "benchmarks")
MOST_FILES = 9
# From the lowest room up; modules of one room are side by side.
ROOMS = (
    ("utils.files", "utils.log", "utils.ranks", "utils.device"),
    ("utils.forms",),
    ("utils.sets",),
    ("utils.student",),
    ("utils.matching", "utils.experts"),
    ("utils.scoring",),
    ("utils.report",),
    ("utils.setup",),
    ("utils.cli",),
    ("buffer", "coreset", "distill", "evaluate"),
    ("benchmarks",),
)
ERROR = "data.errors.InputError"


def python_files() -> list[str]:
    """All .py files outside tests, hidden folders and virtual environments, relative to the root."""
    found = []
    for folder, folders, files in os.walk(ROOT):
        here = Path(folder)
        folders[:] = [
            name for name in folders if not name.startswith(".") and not (here / name / "pyvenv.cfg").exists()
        ]
        if here == ROOT:
            folders.remove("tests")
        found += [(here / name).relative_to(ROOT).as_posix() for name in files if name.endswith(".py")]
    return sorted(found)


def tree() -> list[str]:
    """The entries of the page's tree, with the folders that they stand in."""
    (block,) = re.findall(r"^```text\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    folders, entries = [], []
    for line in block.splitlines():
        found = ENTRY.match(line)
        assert found, f"neither a file nor a folder: {line}"
        depth, odd = divmod(len(found[1]), 2)
        assert not odd and depth <= len(folders), f"indented too far or by one: {line}"
        folders[depth:] = [found[2]] if found[2].endswith("/") else []
        entries.append("".join(folders) + ("" if found[2].endswith("/") else found[2]))
    return entries


def module_of(path: str) -> str:
    return path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def imported(path: str) -> list[tuple[int, str]]:
    """(line, dotted name) of everything that a file imports, in functions too."""
    found = []
    for node in ast.walk(ast.parse((ROOT / path).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            package = path.split("/")[: -node.level] if node.level else []
            base = ".".join([*package, *filter(None, [node.module])])
            found += [(node.lineno, f"{base}.{alias.name}") for alias in node.names]
    return found


def room_of(name: str) -> int:
    """Number of the room of a module or of a name in it; -1 for data, networks and all that is not ours."""
    rooms = (n for n, room in enumerate(ROOMS) for part in room if f"{name}.".startswith(f"{part}."))
    return next(rooms, -1)


def test_the_tree_names_every_file_once_and_no_other():
    entries = Counter(tree())
    assert [entry for entry, times in entries.items() if times > 1] == []
    files = {path for path in python_files() if not path.endswith("__init__.py")}
    named = {entry for entry in entries if entry.endswith(".py")}
    assert (sorted(files - named), sorted(named - files)) == ([], [])
    assert [entry for entry in entries if entry.endswith("/") and not (ROOT / entry).is_dir()] == []


def test_files_that_the_rest_of_the_page_names_exist():
    text = re.sub(r"^```text\n.*?^```$", "", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    names = set(re.findall(r"[\w/]+\.py", text))
    known = {*tree(), *python_files(), *(path.relative_to(ROOT).as_posix() for path in (ROOT / "tests").glob("*.py"))}
    assert [name for name in sorted(names) if not any(f"/{entry}".endswith(f"/{name}") for entry in known)] == []


def test_folders_stay_small():
    counts = Counter(str(Path(path).parent) for path in python_files() if path.startswith(FOLDERS))
    assert max(counts.values()) <= MOST_FILES, counts


def test_every_module_has_a_room():
    lowest = ("data/", "networks/", "utils/__init__.py")
    assert [path for path in python_files() if room_of(module_of(path)) < 0 and not path.startswith(lowest)] == []


@pytest.mark.parametrize("path", python_files())
def test_no_module_imports_from_a_room_above(path):
    own = room_of(module_of(path))
    assert [(line, name) for line, name in imported(path) if room_of(name) > own] == []


@pytest.mark.parametrize("path", [path for path in python_files() if path.startswith(("data/", "networks/"))])
def test_data_and_networks_stand_alone(path):
    names = [name for _, name in imported(path)]
    other = "networks" if path.startswith("data/") else "data"
    assert [name for name in names if name.split(".")[0] in ("utils", other) and name != ERROR] == []


def test_only_tests_import_tests():
    assert [path for path in python_files() for _, name in imported(path) if name.split(".")[0] == "tests"] == []
