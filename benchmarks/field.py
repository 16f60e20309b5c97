"""A table of the field: every recipe of distill.py on one data set, with one budget of seconds for a number of pairs.

    python -m benchmarks.field --output F --pairs 100 200 --seconds 180 240 -- --dataset demo --buffer_path B

What follows `--` goes to distill.py in every cell: data, encoders, what trains. All cells share the experts, and the
real pairs that they start from. A cell times a few iterations, runs distill.py for as many as the budget holds, and
scores the set that was best on validation on the test split with rates chosen on validation, by the same candidates
for all. A finished cell is kept: the command goes on where it stopped. A run that ends early, because its loss is no
longer finite, counts with the best set it had.
"""

import argparse
import itertools
import json
import os
import shutil
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from utils.cli import recipes
from utils.files import save_text
from utils.scoring import recall_table
from utils.scoring.retrieval import RECALLS

RECIPES = tuple(name for name in recipes.RECIPES if name != "demo")  # whose lengths are those of one short run
GRADIENTS = {"exact": 1, "TESLA": 0}
TRIAL = 5  # iterations that tell the pace
# Of the networks of every cell, while it runs and at last.
PROTOCOL = {"epoch_eval_train": 100, "batch_train": 128, "temperature": 0.07}
LOOKS = 4  # evaluations on validation, beside the one at the start
# Settings that change with the number of pairs: as published for Flickr30K by LoRS, RepBlend and PTM-ST, and what was
# found for `heads` (docs/notebook/outer-optimizers.md).
OF_LORS = {
    200: {"lr_img": 1000, "lr_txt": 1000, "sim_rank": 5, "alpha": 1},
    500: {"lr_img": 1000, "lr_txt": 1000, "lr_sim": 100, "sim_rank": 20, "alpha": 0.01, "mini_batch_size": 40},
}
OF_SIZE = {
    "lors": OF_LORS,
    "repblend": OF_LORS,
    "ptmst": {200: {"phases": 2}, 500: {"phases": 2, "mini_batch_size": 40}},
    "heads": {
        200: {**OF_LORS[200], "segments": 2},
        500: {**OF_LORS[500], "segments": 2, "lr_teacher_img": 0.1, "lr_teacher_txt": 0.1},
    },
}
ROOT = Path(__file__).parents[1]


def parse_args(argv=None):
    argv = sys.argv[1:] if argv is None else list(argv)
    own, shared = (argv[: argv.index("--")], argv[argv.index("--") + 1 :]) if "--" in argv else (argv, [])
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--output", type=Path, required=True, help="folder of the cells, table.md, table.json and curves.png")
    add("--pairs", type=int, nargs="+", default=[100], help="numbers of pairs")
    add("--seconds", type=float, nargs="+", default=[300.0], help="of matching in a cell, for each number of pairs")
    add("--recipes", nargs="+", choices=RECIPES, default=list(RECIPES))
    add("--gradients", nargs="+", choices=GRADIENTS, default=list(GRADIENTS))
    add("--tesla_pairs", type=int, nargs="+", help="numbers of pairs with TESLA's gradient too; all if not given")
    add(
        "--seeds",
        type=int,
        nargs="+",
        default=[0, 1],
        help="of the distillation; further ones for the first pairs and gradient",
    )
    add("--grid_img", nargs="+", default=["0.03", "0.1"], help="image rates that scoring tries beside a set's own")
    add("--grid_txt", nargs="+", default=["0.03", "0.1"], help="text rates")
    add("--num_eval", type=int, default=3, help="networks for each score")
    add("--jobs", type=int, default=1, help="cells at a time")
    args = parser.parse_args(own)
    if len(args.seconds) != len(args.pairs):
        parser.error(f"--seconds has {len(args.seconds)} values for {len(args.pairs)} numbers of pairs")
    return argparse.Namespace(**vars(args), shared=shared)


def main(argv=None) -> None:
    args = parse_args(argv)
    with ThreadPoolExecutor(args.jobs) as pool:
        done = pool.map(lambda cell: finished(cell, args), cells(args))
        for cell in done:
            print(
                f"{cell['name']}: {cell['iterations']} iterations, test mean {cell['mean']['r_mean']:.1f}", flush=True
            )
            write_results(args)
    write_results(args)


def cells(args) -> list[dict]:
    """recipe, gradient, pairs, seed, seconds and name of each cell; those of the first seed and few pairs first."""
    found = []
    budget = dict(zip(args.pairs, args.seconds, strict=True))
    for seed, pairs, gradient, recipe in itertools.product(args.seeds, args.pairs, args.gradients, args.recipes):
        skipped = gradient == "TESLA" and pairs not in (args.tesla_pairs or args.pairs)
        if skipped or (seed != args.seeds[0] and (pairs, gradient) != (args.pairs[0], args.gradients[0])):
            continue
        name = f"{recipe}_{gradient}_{pairs}_{seed}"
        cell = {"recipe": recipe, "gradient": gradient, "pairs": pairs, "seed": seed, "seconds": budget[pairs]}
        found.append({**cell, "name": name})
    return found


def finished(cell: dict, args) -> dict:
    """The cell with its results, from its file if it is there."""
    folder = args.output / cell["name"]
    result = folder / "cell.json"
    if result.exists():
        return json.loads(result.read_text())
    folder.mkdir(parents=True, exist_ok=True)
    iterations = iterations_for(cell, args, folder)
    look = max(1, iterations // LOOKS)
    length = ["--Iteration", iterations, "--eval_it", look, "--num_eval", 2]
    resume = ["--resume"] if (folder / "run/state.safetensors").exists() else []
    command = [*flags(cell, args), *length, *resume, "--save_dir", folder / "run"]
    memory = run("distill.py", command, folder, folder / "run/best.safetensors")
    evaluation = folder / "evaluation.json"
    rates = ["--tune_rates", "--grid_img", *args.grid_img, "--grid_txt", *args.grid_txt]
    trained = itertools.chain.from_iterable((f"--{name}", value) for name, value in PROTOCOL.items())
    score = [*rates, *trained, "--num_eval", args.num_eval, "--json", evaluation]
    run("evaluate.py", ["--synset", folder / "run/best.safetensors", *score], folder, evaluation)
    (row,) = json.loads(evaluation.read_text())["rows"]
    lines = metrics(folder / "run")
    pace = pace_of(metrics(folder / "trial"), lines)
    curve = [[line["step"] * pace, line["r_mean"]] for line in lines if "r_mean" in line]
    done = sum("Grand_Loss" in line for line in lines)
    measured = {"iterations": done, "planned": iterations, "pace": pace, "memory_gb": memory, "curve": curve}
    cell = {**cell, **measured, **{key: row[key] for key in ("rates", "mean", "std", "trains")}}
    save_text(result, json.dumps(cell, indent=1) + "\n")
    return cell


def iterations_for(cell: dict, args, folder: Path) -> int:
    """As many as the budget holds, by the pace of a trial; kept, so that a cell that was stopped goes on."""
    plan = folder / "iterations.json"
    if not plan.exists():
        shutil.rmtree(folder / "trial", ignore_errors=True)
        trial = [*flags(cell, args), "--Iteration", TRIAL, "--eval_it", 10**6, "--num_eval", 1]
        trial += ["--epoch_eval_train", 1, "--save_dir", folder / "trial"]
        run("distill.py", trial, folder, folder / "trial/metrics.jsonl")
        pace = pace_of(metrics(folder / "trial"))
        save_text(plan, json.dumps(max(LOOKS, round(cell["seconds"] / pace))))
    return json.loads(plan.read_text())


def flags(cell: dict, args) -> list:
    """Of distill.py; what is given for all cells goes before a recipe."""
    recipe, pairs = cell["recipe"], cell["pairs"]
    learns_similarity = "sim_type" in recipes.RECIPES[recipe].get("distill.py", {})  # it takes the place of one pair
    own = {"num_queries": pairs - 1 if learns_similarity else pairs, "seed": cell["seed"]}
    own |= {"adjoint_decay": GRADIENTS[cell["gradient"]], **PROTOCOL, **OF_SIZE.get(recipe, {}).get(pairs, {})}
    named = itertools.chain.from_iterable((f"--{name}", value) for name, value in own.items())
    return ["--recipe", recipe, *named, *args.shared, "--disabled_wandb", "--no_draw", "--no_report"]


def run(script: str, argv: list, folder: Path, needed: Path) -> float:
    """Runs a script with its output in the folder's log; gives its peak memory in GB. It must leave `needed`."""
    command = [sys.executable, str(ROOT / script), *map(str, argv)]
    with (folder / "log.txt").open("a") as log:
        process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(process.pid, 0)
    if status and not needed.exists():
        raise SystemExit(f"{folder.name}: {script} failed; see {folder / 'log.txt'}")
    return usage.ru_maxrss / 1e6


def metrics(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def pace_of(*runs: list[dict]) -> float:
    """Seconds of an iteration: the median over those with no evaluation between them and the one before."""
    both = itertools.chain.from_iterable(map(itertools.pairwise, runs))
    return statistics.median(b["Seconds"] - a["Seconds"] for a, b in both if "Grand_Loss" in a and "Grand_Loss" in b)


def write_results(args) -> None:
    """The table, its numbers and the curves of all finished cells in the folder, of earlier commands too."""
    done = [json.loads(path.read_text()) for path in sorted(args.output.glob("*/cell.json"))]
    save_text(args.output / "table.json", json.dumps(done, indent=1) + "\n")
    save_text(args.output / "table.md", table(done) + "\n")
    draw_curves(done, args.output / "curves.png")


def table(done: list[dict]) -> str:
    """Markdown, best first for each number of pairs."""
    columns = "pairs", "recipe", "gradient", "seed", "trains", "iterations", "s / iteration", "peak memory", "rates"
    rows = {}
    for cell in sorted(done, key=lambda cell: (cell["pairs"], -cell["mean"]["r_mean"])):
        iterations = f"{cell['iterations']}" + (
            f" of {cell['planned']}" if cell["iterations"] < cell["planned"] else ""
        )
        cost = iterations, f"{cell['pace']:.2f}", f"{cell['memory_gb']:.1f} GB"
        rates = " ".join(f"{rate:.3g}" for rate in cell["rates"])
        names = (*(cell[key] for key in ("pairs", "recipe", "gradient", "seed", "trains")), *cost, rates)
        rows[tuple(map(str, names))] = cell
    return recall_table({name: spread(cell) for name, cell in rows.items()}, columns)


def spread(cell: dict) -> list[dict]:
    """Two networks' recalls with the mean and standard deviation of the cell's."""
    return [{key: cell["mean"][key] + sign * cell["std"][key] for key in RECALLS} for sign in (-1, 1)]


def draw_curves(done: list[dict], path: Path) -> None:
    """Validation recall against seconds: a panel for each number of pairs, a line a recipe, TESLA's dashed."""
    from matplotlib.figure import Figure

    sizes = sorted({cell["pairs"] for cell in done})
    if not sizes:
        return
    exact_first = sorted(done, key=lambda cell: cell["gradient"] != "exact")  # the labels are of the first lines
    figure = Figure(figsize=(1 + 4 * len(sizes), 4), layout="constrained")
    for axes, pairs in zip(figure.subplots(1, len(sizes), squeeze=False)[0], sizes, strict=True):
        labelled = set()
        for cell in (cell for cell in exact_first if cell["pairs"] == pairs):
            recipe, style = cell["recipe"], "-" if cell["gradient"] == "exact" else "--"
            label = None if recipe in labelled else recipe
            axes.plot(*zip(*cell["curve"], strict=True), style, color=f"C{RECIPES.index(recipe)}", label=label)
            labelled.add(recipe)
        axes.set(title=f"{pairs} pairs", xlabel="seconds of matching", ylabel="validation, mean of six recalls in %")
        axes.legend(title="— exact, -- TESLA")
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    main()
