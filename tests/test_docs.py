"""The pages: the program in them runs, links lead somewhere, commands have the flags that are there, results agree."""

import functools
import importlib
import itertools
import re
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

import evaluate

ROOT = Path(__file__).parents[1]
DOCS, NOTEBOOK = ROOT / "docs", ROOT / "docs/notebook"
MANUAL = [ROOT / "README.md", *sorted(DOCS.glob("*.md"))]
PAGES = [*MANUAL, *sorted(NOTEBOOK.glob("*.md")), *sorted((ROOT / "benchmarks").glob("*.md"))]
OTHERS = [ROOT / "CHANGELOG.md", ROOT / "CONTRIBUTING.md"]
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
    is_package = (ROOT / module.replace(".", "/")).is_dir()
    program = importlib.import_module(f"{module}.__main__" if is_package else module)
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
    exec(compile(program, "docs/files.md", "exec"), names)
    return names


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def prose(page: Path) -> str:
    """A page without its blocks of code."""
    return BLOCK.sub("", page.read_text(encoding="utf-8"))


def headings(page: Path) -> list[str]:
    """The names that a page's headings have in links."""
    titles = re.findall(r"^#+ (.*)$", prose(page), re.MULTILINE)
    return [re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles]


def links(page: Path) -> list[str]:
    return re.findall(r"\]\(([^)]+)\)", prose(page))


def means(page: Path) -> set[str]:
    """Recalls with their deviations, such as 34.3 ± 0.2."""
    return set(re.findall(r"\d+\.\d ± \d+\.\d", " ".join(page.read_text(encoding="utf-8").split())))


def section(page: Path, title: str) -> str:
    return prose(page).partition(f"\n## {title}\n")[2].partition("\n## ")[0]


def first_table(text: str) -> list[list[str]]:
    """The cells of its rows, without its head."""
    rows = itertools.dropwhile(lambda line: not line.startswith("|"), text.splitlines())
    rows = itertools.takewhile(lambda line: line.startswith("|"), rows)
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows][2:]


def numbers(text: str) -> list[str]:
    return re.findall(r"\d+\.\d", text)


def seeds(of_seed: dict[str, str]) -> list[str]:
    return [mean for _, mean in sorted(of_seed.items())]


def test_the_program_of_the_docs_trains_a_network_on_a_saved_set(straight, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert evaluate.main(["--synset", str(straight / "best.safetensors"), "--export", "demo_pairs"]) == 0
    (program,) = blocks(DOCS / "files.md", "python")
    assert not set(re.findall(r"^(?:from|import) (\w+)", program, re.MULTILINE)) & {"data", "networks", "utils"}
    names = run(program)
    with safe_open(straight / "best.safetensors", "pt") as file:
        image_syn, *rates = (file.get_tensor(name) for name in ("image_syn", "syn_lr_img", "syn_lr_txt"))
    shown = image_syn.clamp(-1, 1)  # mean and std of the demo's encoder are 0.5
    assert (names["images"] - shown).abs().max() <= 1 / 255 + 1e-6
    assert [group["lr"] for group in names["optimizer"].param_groups] == [rate.item() for rate in rates]
    assert "range(20)" in program
    assert names["loss"] < 0.8 * run(program.replace("range(20)", "range(1)"))["loss"]


@pytest.mark.parametrize("page", [*PAGES, *OTHERS], ids=name_of)
def test_links_lead_somewhere(page):
    for target in links(page):
        if not target.startswith("https://"):
            file, _, heading = target.partition("#")
            there = page.parent / file if file else page
            assert there.is_file(), target
            assert not heading or headings(there).count(heading) == 1, target


@pytest.mark.parametrize("page", [page for page in PAGES if commands(page)], ids=name_of)
def test_commands_use_flags_that_exist(page):
    for program, arguments in commands(page):
        own, _, handed_on = arguments.partition(" -- ")  # from a benchmark to the script that it runs
        script = "evaluate" if program == "benchmarks.transfer" else "distill"
        for taker, given in ((program, own), (script, handed_on)):
            unknown = set(re.findall(r"(?<!\S)--\w+", given)) - flags(taker)
            assert not unknown, f"{taker} has no {unknown}"


@pytest.mark.parametrize("folder", [DOCS, NOTEBOOK], ids=name_of)
def test_every_page_is_linked_from_the_list_of_its_folder(folder):
    contents = {DOCS: ROOT / "README.md", NOTEBOOK: NOTEBOOK / "README.md"}[folder]
    linked = {(contents.parent / target).resolve() for target in links(contents)}
    assert [page.name for page in folder.glob("*.md") if page not in linked | {contents}] == []


def test_results_of_the_readme_stand_in_a_page():
    readme, *pages = MANUAL
    assert means(readme) - set().union(*map(means, pages)) == set()


@pytest.mark.parametrize("page", ["methods", "heads", "comparing"])
def test_results_of_a_page_stand_in_the_notebook(page):
    measured = set().union(*map(means, NOTEBOOK.glob("*.md")))
    assert means(DOCS / f"{page}.md") - measured == set()


def test_table_of_recipes_is_that_of_the_notebook():
    recalls, paces = {}, {}
    for network in ("Heads over frozen encoders", "Whole networks"):
        for row in first_table(section(NOTEBOOK / "field.md", network)):
            pairs, recipe, gradient, seed, iterations, seconds, *_, mean = row
            cell = network, pairs, recipe.replace("Adam, all pairs", "adam")
            if gradient == "exact":
                recalls.setdefault(cell, {})[seed] = mean.split()[0]
                paces[(*cell, seed)] = f"{iterations}, {seconds}"
    rows = first_table(prose(DOCS / "methods.md"))
    assert len(rows) == 6
    for recipe, _, *of_heads, pace, whole in rows:
        recipe = recipe.strip("`")
        for pairs, text in zip(("100", "200", "500"), of_heads, strict=True):
            assert numbers(text) == seeds(recalls["Heads over frozen encoders", pairs, recipe])
        assert numbers(whole) == seeds(recalls.get(("Whole networks", "100", recipe), {}))
        assert pace == paces["Heads over frozen encoders", "100", recipe, "0"]
