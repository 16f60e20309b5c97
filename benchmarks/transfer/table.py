"""The table of transfer and its chart.

A cell is a dict: `name` of the set, `image_encoder`, `text_encoder`, `mean` and `std` of its test recall over networks,
`took_part`, whether the set was learned through the image encoder, and what the set holds.
"""

from pathlib import Path

from benchmarks.measure import table as markdown
from utils.scoring import ALL_DATA, mean_text


def table(cells: list[dict]) -> str:
    """Markdown, a table for each text encoder: a row a set, a column an image encoder.

    "recall ± std over networks (share)", bold where the encoder took part.
    """
    parts = []
    for text_encoder in _unique(cells, "text_encoder"):
        own = [cell for cell in cells if cell["text_encoder"] == text_encoder]
        encoders = _unique(own, "image_encoder")
        by_place = {(cell["name"], cell["image_encoder"]): cell for cell in own}
        rows = []
        for name in sorted(_unique(own, "name"), key=lambda name: name == ALL_DATA):  # experts last
            found = {encoder: by_place.get((name, encoder)) for encoder in encoders}
            values = [_text(cell, by_place.get((ALL_DATA, encoder))) for encoder, cell in found.items()]
            rows.append([name, *_size(next(filter(None, found.values()))), *values])
        parts.append(f"Text encoder {text_encoder}:\n\n{markdown(['set', 'pairs', 'pictures', 'MB', *encoders], rows)}")
    return "\n\n".join(parts)


def _unique(cells: list[dict], key: str) -> list[str]:
    return list(dict.fromkeys(cell[key] for cell in cells))


def _size(cell: dict) -> list[str]:
    if cell["name"] == ALL_DATA:
        return ["all", "all", ""]
    return [str(cell["pairs"]), str(cell["pictures"]), f"{cell['megabytes']:.1f}"]


def _text(cell: dict | None, experts: dict | None) -> str:
    if cell is None:
        return ""
    text = mean_text(cell["mean"], cell["std"])
    if experts and cell is not experts:
        text += f" ({share(cell, experts):.2f})"
    return f"**{text}**" if cell["took_part"] else text


def share(cell: dict, experts: dict) -> float:
    """Of the recall of experts on all data with the same encoders."""
    return cell["mean"] / experts["mean"]


def draw_shares(cells: list[dict], path: Path) -> None:
    """Shares, a panel a text encoder, bars in groups of an image encoder; hatched where it took no part.

    Nothing is drawn without experts.
    """
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    experts = {(c["text_encoder"], c["image_encoder"]): c for c in cells if c["name"] == ALL_DATA}
    sets = [cell for cell in cells if (cell["text_encoder"], cell["image_encoder"]) in experts]
    sets = [cell for cell in sets if cell["name"] != ALL_DATA]
    if not sets:
        return
    panels, names = _unique(sets, "text_encoder"), _unique(sets, "name")
    colours = {name: f"C{number}" for number, name in enumerate(names)}
    figure = Figure(figsize=(9, 1 + 3 * len(panels)), layout="constrained")
    for axes, text_encoder in zip(figure.subplots(len(panels), 1, squeeze=False)[:, 0], panels, strict=True):
        own = [cell for cell in sets if cell["text_encoder"] == text_encoder]
        encoders, here = _unique(own, "image_encoder"), _unique(own, "name")
        for number, name in enumerate(here):
            bars = [cell for cell in own if cell["name"] == name]
            places = [encoders.index(cell["image_encoder"]) + 0.8 * number / len(here) for cell in bars]
            heights = [share(cell, experts[text_encoder, cell["image_encoder"]]) for cell in bars]
            hatches = ["" if cell["took_part"] else "//" for cell in bars]
            axes.bar(places, heights, 0.75 / len(here), hatch=hatches, edgecolor="white", color=colours[name])
        axes.set_xticks([place + 0.4 - 0.4 / len(here) for place in range(len(encoders))], encoders)
        axes.set(title=f"text encoder {Path(text_encoder).name}", ylabel="share of experts on all data", ylim=(0, 1))
    figure.legend(
        [Patch(color=colours[name]) for name in names],
        names,
        title="hatched: took no part",
        ncols=3,
        loc="outside lower center",
    )
    figure.savefig(path, dpi=150)
