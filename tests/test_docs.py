"""README.md and docs/: the program in them runs, links lead somewhere, commands have the flags that are there."""

import functools
import importlib
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
PROGRAM = re.compile(r"\b(?:python (?:-m )?|torchrun .*?(?=\w+\.py))(\S+)(.*)")


def blocks(page: Path, language: str) -> list[str]:
    return [text for found, text in BLOCK.findall(page.read_text(encoding="utf-8")) if found == language]


def commands(page: Path) -> list[tuple[str, str]]:
    """Programs, as modules, and their arguments, with the shell's NAME="..." put in for $NAME."""
    found, variables = [], {}
    for line in "".join(blocks(page, "")).splitlines():
        variables.update(re.findall(r'^(\w+)="(.*)"$', line))
        for program, arguments in PROGRAM.findall(line):
            arguments = re.sub(r"\$(\w+)", lambda name: variables.get(name[1], name[0]), arguments)
            found.append((program.removesuffix(".py"), arguments))
    return found


@functools.cache
def flags(module: str) -> set[str]:
    """The flags in the program's own help, and their --no_ forms, which it does not list."""
    program = importlib.import_module(module)
    if not hasattr(program, "parse_args"):
        return set()
    parser_help = []
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr("argparse.ArgumentParser._print_message", lambda parser, text, file: parser_help.append(text))
        program.parse_args(["--help"])
    listed = re.findall(r"--(\w+)", "".join(parser_help))
    return {f"--{prefix}{name}" for name in listed for prefix in ("", "no_")}


def run(program: str) -> dict:
    """The names that a program leaves behind."""
    torch.manual_seed(0)
    names = {}
    exec(compile(program, "README.md", "exec"), names)
    return names


def headings(page: Path) -> set[str]:
    """The names that a page's headings have in links."""
    titles = re.findall(r"^#+ (.*)$", BLOCK.sub("", page.read_text(encoding="utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


def test_program_of_the_readme_trains_a_network_on_a_saved_set(straight, tmp_path, monkeypatch):
    (tmp_path / "runs/demo").mkdir(parents=True)
    shutil.copy(straight / "best.safetensors", tmp_path / "runs/demo")
    monkeypatch.chdir(tmp_path)
    (program,) = blocks(ROOT / "README.md", "python")
    names = run(program)
    with safe_open("runs/demo/best.safetensors", "pt") as file:
        image_syn, *rates = (file.get_tensor(name) for name in ("image_syn", "syn_lr_img", "syn_lr_txt"))
    assert torch.allclose(names["pixels"], image_syn / 2 + 0.5)  # mean and std of the demo's encoder are 0.5
    assert [group["lr"] for group in names["optimizer"].param_groups] == [rate.item() for rate in rates]
    assert "range(20)" in program
    assert names["loss"] < 0.8 * run(program.replace("range(20)", "range(1)"))["loss"]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)]+)\)", page.read_text(encoding="utf-8")):
        if not target.startswith("https://"):
            file, _, heading = target.partition("#")
            assert (page.parent / file).is_file(), target
            assert not heading or heading in headings(page.parent / file), target


@pytest.mark.parametrize("page", [page for page in PAGES if commands(page)], ids=lambda page: page.name)
def test_commands_use_flags_that_exist(page):
    for program, arguments in commands(page):
        own, _, handed_on = arguments.partition(" -- ")  # from a benchmark to the script that it runs
        for taker, given in ((program, own), ("distill", handed_on)):
            unknown = set(re.findall(r"(?<!\S)--\w+", given)) - flags(taker)
            assert not unknown, f"{taker} has no {unknown}"


def test_every_page_is_linked_from_the_readme():
    readme = PAGES[0].read_text(encoding="utf-8")
    assert [page.name for page in PAGES[1:] if f"(docs/{page.name})" not in readme] == []
