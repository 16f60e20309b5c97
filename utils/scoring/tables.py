"""Recalls as tables: means over networks, the Markdown table, its numbers, and how sets compare in one line.

A row is a dict: `set` (a path, or "all data"), `method`, `image_encoder`, `trains` and `results`, the recalls of each
network. A set's row also has `pairs`, the `pictures` and `megabytes` that it holds, `took_part`, whether it was learned
through that encoder, `rates`, `loss_type` and `texts`, how its texts were made (a key of `TEXTS`), and `looks` if the
best of some looks at the test split is among its numbers; that of all data has `experts` and their `epochs`.
"""

import statistics
from collections.abc import Sequence
from pathlib import Path

from utils.scoring.evaluation import BEST_LOOK
from utils.scoring.retrieval import RECALLS
from utils.sets import SynSet

ALL_DATA = "all data"
COLUMNS = ("set", "pairs", "image encoder", "rates", "trains")
# What a set's texts are, see `utils.setup.texts`, and what the table says of them.
TEXTS = {
    "learned": None,
    "nearest": "nearest captions",
    "carried": "texts carried",
    "captions": "captions embedded anew",
    "mixed": "sentences embedded anew",
}


def mean_and_std(results: list[dict[str, float]]) -> tuple[dict[str, float], dict[str, float]]:
    """Means and population standard deviations of each number over the models."""
    columns = {key: [result[key] for result in results] for key in results[0]}
    return {k: statistics.fmean(v) for k, v in columns.items()}, {k: statistics.pstdev(v) for k, v in columns.items()}


def mean_text(mean: float, std: float) -> str:
    """ "12.3 ± 0.4", recalls in per cent."""
    return f"{mean:.1f} ± {std:.1f}"


def rates_text(rates: Sequence[float]) -> str:
    """ "0.01 0.1", of the image and of the text tower."""
    return " ".join(f"{rate:.3g}" for rate in rates)


def recall_table(
    rows: dict[tuple | str, list[dict[str, float]]], columns: tuple[str, ...] = ("set",), best_look: str | None = None
) -> str:
    """Markdown: a row per entry, recalls in per cent as mean ± std over its models.

    A key of `rows` is what stands in the first `columns`: a tuple, or a string if it is one column. `best_look` heads
    one more column for the mean recall of the best look, empty where there was none.
    """
    head = [*columns, "TR@1", "TR@5", "TR@10", "IR@1", "IR@5", "IR@10", "mean", *([best_look] if best_look else [])]
    keys = [*RECALLS, *([f"{BEST_LOOK}r_mean"] if best_look else [])]
    lines = [head, ["---"] * len(head)]
    for name, results in rows.items():
        mean, std = mean_and_std(results)
        cells = (mean_text(mean[key], std[key]) if key in mean else "" for key in keys)
        lines.append([*([name] if isinstance(name, str) else name), *cells])
    return _markdown(lines)


def _markdown(lines: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def best_look_name(rows: list[dict]) -> str | None:
    """What the mean recall of the best look is called in tables; None if there were no looks."""
    return next((f"best of {row['looks']} looks at test" for row in rows if "looks" in row), None)


def set_names(paths: list[str]) -> dict[str, str]:
    """The sets' short names by path: the file's stem, or the whole path where two have the same stem."""
    stems = [Path(path).stem for path in paths]
    return {path: stem if stems.count(stem) == 1 else path for path, stem in zip(paths, stems, strict=True)}


def markdown_table(rows: list[dict]) -> str:
    """The table of sets, encoders and recalls."""
    names = _names(rows)
    table = {}
    for row in rows:
        rates = rates_text(row.get("rates", []))
        label = _all_data(row) if row["set"] == ALL_DATA else f"{names[row['set']]} ({_made(row)})"
        table[label, str(row.get("pairs", "all")), row["image_encoder"], rates, row["trains"]] = row["results"]
    return recall_table(table, COLUMNS, best_look_name(rows))


def encoder_table(rows: list[dict]) -> str | None:
    """Markdown: mean recalls, a row per set and a column per image encoder; None for one encoder.

    In brackets the share of all data's where that is there and not 0. A star marks an encoder that took part in the
    learning.
    """
    encoders = list(dict.fromkeys(row["image_encoder"] for row in rows))
    if len(encoders) == 1:
        return None
    names, lines = _names(rows), [["mean recall", "pairs", *encoders], ["---"] * (len(encoders) + 2)]
    whole = {row["image_encoder"]: _mean_recall(row)[0] for row in rows if row["set"] == ALL_DATA}
    for path in dict.fromkeys(row["set"] for row in rows):
        own = {row["image_encoder"]: row for row in rows if row["set"] == path}
        pairs = str(next(iter(own.values())).get("pairs", "all"))
        cells = (_short_cell(own[name], whole.get(name)) if name in own else "" for name in encoders)
        lines.append([names[path], pairs, *cells])
    return _markdown(lines)


def _mean_recall(row: dict) -> tuple[float, float]:
    mean, std = mean_and_std(row["results"])
    return mean["r_mean"], std["r_mean"]


def _short_cell(row: dict, whole: float | None) -> str:
    """ "34.7 ± 0.7 (0.92) *", see `encoder_table`; `whole` is the mean recall of all data."""
    mean, std = _mean_recall(row)
    share = f" ({mean / whole:.2f})" if whole and row["set"] != ALL_DATA else ""
    return mean_text(mean, std) + share + (" *" if row.get("took_part") else "")


def row_of_set(path: str, synset: SynSet, image_encoder: str, trains: str, results: list[dict], looks: int = 0) -> dict:
    """The row of a set on one image encoder; see above for its parts."""
    row = {
        "set": path,
        "method": synset.settings["method"],
        "pairs": len(synset.captions),
        "pictures": len(synset.mixture.words if synset.mixture else synset.captions),
        "megabytes": round(synset.nbytes / 1e6, 3),
        "image_encoder": image_encoder,
        "took_part": _took_part(synset, image_encoder),
        "trains": trains,
        "rates": [synset.syn_lr_img, synset.syn_lr_txt],
        "loss_type": synset.loss_type,
        "texts": synset.texts,
        "results": results,
    }
    return {**row, "looks": looks} if looks else row


def _took_part(synset: SynSet, image_encoder: str) -> bool:
    """Whether the pairs were learned through this encoder, alone or among others."""
    names = synset.settings.get("image_encoder")
    names = names if isinstance(names, list) else [names]
    return synset.settings["method"].startswith("distilled") and image_encoder in names


def as_numbers(row: dict) -> dict:
    """The row for a JSON file: without the single networks' recalls, with their mean, std and number."""
    mean, std = mean_and_std(row["results"])
    networks = len(row["results"])
    return {**{k: v for k, v in row.items() if k != "results"}, "networks": networks, "mean": mean, "std": std}


def compare_rows(rows: list[dict]) -> list[str]:
    """A line per image encoder: mean recalls as multiples of the first set's and of all data's, where there are such.

    Nothing can be said relative to a mean recall of 0.
    """
    lines, names = [], _names(rows)
    for encoder in dict.fromkeys(row["image_encoder"] for row in rows):
        own = [row for row in rows if row["image_encoder"] == encoder]
        for row in own:
            if row["set"] == ALL_DATA:
                names[ALL_DATA] = _all_data(row)
        recalls = {r["set"]: mean_and_std(r["results"])[0]["r_mean"] for r in own}
        sets = [path for path in recalls if path != ALL_DATA]
        parts = []
        for base, compared in ((sets[0], sets[1:]), (ALL_DATA, sets)):
            if compared and recalls.get(base):
                ratios = (f"{names[path]} {recalls[path] / recalls[base]:.2f}" for path in compared)
                parts.append(f"of {names[base]}: {', '.join(ratios)}")
        if parts:
            lines.append(f"mean recall on {encoder} as a multiple {'; '.join(parts)}")
    return lines


def _names(rows: list[dict]) -> dict[str, str]:
    names = set_names(list(dict.fromkeys(row["set"] for row in rows if row["set"] != ALL_DATA)))
    for row in rows:
        if row["set"] == ALL_DATA:
            names[ALL_DATA] = _all_data(row)
    return names


def _all_data(row: dict) -> str:
    return f"{ALL_DATA} ({counted(row['experts'], 'expert')}, {counted(row['epochs'], 'epoch')})"


def _made(row: dict) -> str:
    loss = None if row["loss_type"] == "InfoNCE" else row["loss_type"]
    mixed = row.get("pictures", row["pairs"]) > row["pairs"]
    size = f"mixtures of {row['pictures']} pictures, {row['megabytes']:.1f} MB" if mixed else None
    return ", ".join(filter(None, [row["method"], loss, TEXTS[row["texts"]], size]))


def counted(number: int, noun: str) -> str:
    """ "1 expert", "2 experts"."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
