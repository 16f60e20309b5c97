"""The page: one HTML file without anything from elsewhere, made from a run folder or from a table of sets."""

from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from utils.files import save_text
from utils.report.charts import check_installed
from utils.report.curves import learning_charts, map_charts, recall_charts
from utils.report.folder import FIRST, History, first_and_shown, first_state, read_history, read_known
from utils.report.pairs import PairGroup, pair_group
from utils.report.words import (
    RECALL_COLUMNS,
    TABLE_COLUMNS,
    describe,
    evaluation_rows,
    headline,
    list_files,
    table_cells,
)
from utils.scoring import best_look_name
from utils.sets import LEFT_OUT, SynSet, load_synset, shown_path, without_paths

TEMPLATES = Path(__file__).parent / "template"


def write_run_page(folder: Path) -> None:
    """Writes report.html of a run folder, from its sets, metrics.jsonl and, if it is there, report.json.

    Raises:
        InputError: no set is there, or the page cannot be written; the previous one remains.
    """
    first, shown = first_and_shown(folder)
    known = read_known(folder)
    group = _group(folder / "best.safetensors", first, shown, known)
    iteration = shown.settings.get("iteration")
    group["title"] = "The pairs" if iteration is None else f"The pairs at iteration {iteration}"
    context = _run_context(folder, read_history(folder / "metrics.jsonl"), known)
    context |= {
        "title": f"{len(shown.captions)} pairs distilled from {shown.settings.get('dataset', 'an unnamed dataset')}",
        "about": None,
        "table_note": "Each set has its own rates; evaluate.py --tune_rates compares at the best rates of each.",
    }
    save_text(folder / "report.html", _render([group], shown.settings, known.get("test", []), context))


def write_table_page(path: Path, sets: list[Path], rows: list[dict], command: str) -> None:
    """Writes the page of an evaluation.

    Args:
        sets: files of the table's sets. Each is shown beside its first state: the one that lies in its folder, or
            the table's first set that is an initial one of the same shape. The run of the first distilled set
            gives the curves, the map and the search.
        rows: as `table_cells` takes them.

    Raises:
        InputError: a set cannot be read, matplotlib is not installed, or the page cannot be written.
    """
    check_installed()
    loaded = {file: load_synset(file) for file in sets}
    runs = [file.parent for file in sets if (file.parent / "metrics.jsonl").is_file()]
    run = runs[0] if runs else None
    known = read_known(run) if run else {}
    initial = [s for s in loaded.values() if s.settings.get("method") == "initial"]
    groups = []
    for file, synset in loaded.items():
        is_initial = synset.settings.get("method") in ("initial", None)
        first = None if is_initial else next((s for s in [first_state(file), *initial] if _fits(s, synset)), None)
        groups.append(_group(file, first, synset, known if file.parent == run else {}))
    context = _run_context(run, read_history(run / "metrics.jsonl") if run else History(), known)
    in_run = [file for file in sets if file.parent == run]
    main = loaded[in_run[0] if in_run else sets[0]]
    dataset = main.settings.get("dataset", "an unnamed dataset")
    context |= {
        "title": f"{len(sets)} {'set' if len(sets) == 1 else 'sets'} of pairs from {dataset}",
        "about": _name(in_run[0], main.settings) if in_run and len(sets) > 1 else None,
        "command": command,
        "folder": None,
        "table_note": "Rates: of the image and of the text tower.",
    }
    context["files"] = [
        {"name": shown_path(f), "what": f"{len(s.captions)} pairs", "size": _size(f)} for f, s in loaded.items()
    ]
    rows = [{**row, "set": row["set"] if row["set"] == row["method"] else _name(row["set"], row)} for row in rows]
    save_text(path, _render(groups, main.settings, rows, context))


def _size(path: Path) -> int:
    """Of a file, or of all files of a folder, in bytes."""
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.is_file())


def _name(file: str | Path, made: dict) -> str:
    """A set by its file's last two parts and its method."""
    return f"{'/'.join(Path(file).with_suffix('').parts[-2:])} ({made.get('method', 'unknown method')})"


def _fits(first: SynSet | None, synset: SynSet) -> bool:
    return first is not None and (first.image_syn.shape, first.text_syn.shape) == (
        synset.image_syn.shape,
        synset.text_syn.shape,
    )


def _group(file: Path, first: SynSet | None, synset: SynSet, known: dict) -> dict:
    """A set for the template: title, pairs and what is to be said of them."""
    nearest = known.get("nearest", {})
    first = first if _fits(first, synset) else None
    nearest_first, nearest_shown = (s and nearest.get(str(s.settings.get("iteration"))) for s in (first, synset))
    group: PairGroup = pair_group(first, synset, nearest_first, nearest_shown)
    note = None
    if first is None and str(synset.settings.get("method", "")).startswith("distilled"):
        note = f"The first state of these pairs, {FIRST}, is not beside the set, so there is no before to show."
    return {
        "title": f"The pairs of {_name(file, synset.settings)}",
        "note": note,
        "first": first is not None,
        **vars(group),
    }


def _run_context(folder: Path | None, history: History, known: dict) -> dict:
    places = known.get("map")
    return {
        "command": known.get("command"),
        "tiles": headline(history, known),
        "recall_charts": _marked(recall_charts(history, known)),
        "learning_charts": _marked(learning_charts(history)),
        "evaluations": evaluation_rows(history),
        "lost": history.lost,
        "map_charts": _marked(map_charts(places)) if places else [],
        "explained": places and places["explained"],
        "search": known.get("search"),
        "folder": folder and folder.absolute().name,
        "files": list_files(folder) if folder else [],
    }


def _marked(charts: list[dict]) -> list[dict]:
    return [{**chart, "svg": Markup(chart["svg"])} for chart in charts]


def _render(groups: list[dict], settings: dict, rows: list[dict], context: dict) -> str:
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    told, settings = describe(without_paths(settings)), without_paths(settings)  # the page is for others too
    del settings[LEFT_OUT]
    template = environment.get_template("report.html.jinja")
    return template.render(
        **context,
        groups=groups,
        sentences=told,
        settings=sorted(settings.items()),
        recall_columns=list(RECALL_COLUMNS.values()),
        **_narrow_table(rows),
    )


def _narrow_table(rows: list[dict]) -> dict:
    """Columns and rows of cells without the columns that are the same in all rows, and a text that tells those."""
    best_look = best_look_name(rows)
    columns = [*TABLE_COLUMNS, *([best_look] if best_look else [])]
    rows = [table_cells(row, best_look is not None) for row in rows]
    told = {
        name: row[i]["text"]
        for row in rows[:1]
        for i, name in enumerate(columns)
        if name in ("image encoder", "trains") and len({other[i]["text"] for other in rows}) == 1
    }
    kept = [i for i, name in enumerate(columns) if name not in told]
    return {
        "columns": [columns[i] for i in kept],
        "rows": [[row[i] for i in kept] for row in rows],
        "alike": ", ".join(f"{name} {text}" for name, text in told.items()),
    }
