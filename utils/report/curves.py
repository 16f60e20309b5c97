"""The page's curves: recall of the evaluations, and what every iteration measured."""

from utils.report.charts import BLUE, FAINT, GREEN, MUTED, ORANGE, PURPLE, Level, Line, line_chart, scatter_chart
from utils.report.folder import History, series
from utils.report.words import ALL_DATA, references

RECALLS = {
    **{"txt_r1": "TR@1", "txt_r5": "TR@5", "txt_r10": "TR@10"},
    **{"img_r1": "IR@1", "img_r5": "IR@5", "img_r10": "IR@10"},
}
COLOURS = BLUE, ORANGE, GREEN, PURPLE
DASHES = "-.", (0, (1, 1)), (0, (5, 1)), (0, (3, 1, 1, 1, 1, 1))


def recall_charts(history: History, known: dict) -> list[dict]:
    """Charts of the recalls on validation as {title, svg, note}: the mean against iterations and seconds, the six."""
    if not history.evaluations:
        return []
    levels = _levels(history, known)
    charts = [_mean_chart("recall", "Mean recall against iterations", "step", "iterations", history, levels)]
    timed = [step for step, line in sorted(history.evaluations.items()) if line.get("Seconds") is not None]
    if timed:
        title = "Mean recall against seconds"
        charts.append(_mean_chart("seconds", title, "Seconds", "seconds, evaluations included", history, levels))
        if len(timed) < len(history.evaluations):
            charts[-1]["note"] = f"Evaluations before iteration {timed[0]} wrote no time; seconds count from later on."
    for way, title in (("txt", "Captions found for a picture (TR)"), ("img", "Pictures found for a caption (IR)")):
        names = {key: label for key, label in RECALLS.items() if key.startswith(way)}
        lines = [
            Line(label, *series(history.evaluations, key), colour)
            for (key, label), colour in zip(names.items(), COLOURS, strict=False)
        ]
        charts.append(_chart(way, title, lines, [], "iterations", "recall, %"))
    return charts


def _mean_chart(name, title, against, xlabel, history, levels):
    x, y = series(history.evaluations, "r_mean", against)
    with_band = {step: line for step, line in history.evaluations.items() if line.get(against) is not None}
    band = [line.get("Std/r_mean") for _, line in sorted(with_band.items())]
    band = band if None not in band else None
    label = "the pairs" + (", ± std over networks" if band else "")
    return _chart(name, title, [Line(label, x, y, BLUE, band)], levels, xlabel, "mean recall, %")


def _levels(history: History, known: dict) -> list[Level]:
    levels = []
    if 0 in history.evaluations:
        levels.append(Level("initial pairs", history.evaluations[0]["r_mean"], colour=MUTED, dashes=":"))
    for i, row in enumerate(references(known)):
        is_all = row["set"] == ALL_DATA
        dashes = "--" if is_all else DASHES[i % len(DASHES)]
        levels.append(Level(row["name"], row["mean"]["r_mean"], colour=GREEN if is_all else ORANGE, dashes=dashes))
    return levels


def learning_charts(history: History) -> list[dict]:
    """Charts of losses, learned rates and gradient norms against iterations; one that was not measured is absent."""
    loss = {"Grand_Loss": "both towers", "Image_Loss": "image tower", "Text_Loss": "text tower"}
    student = {"Student_Loss_First": "first step", "Student_Loss_Last": "last step"}
    rates = {"Synthetic_LR_Image": "image tower", "Synthetic_LR_Text": "text tower"}
    norms = {"Grad_Norm_Image": "pictures", "Grad_Norm_Text": "texts"}
    charts = []
    for name, title, ylabel, names, scale in (
        ("matching", "Matching loss: 2 is a student that stays put", "loss", loss, "zero"),
        ("student", "Student's contrastive loss", "loss", student, "close"),
        ("rates", "Learned rates", "learning rate", rates, "log"),
        ("norms", "Norms of the outer gradient", "norm", norms, "log"),
    ):
        lines = [
            Line(label, *series(history.iterations, key), colour)
            for (key, label), colour in zip(names.items(), COLOURS, strict=False)
        ]
        lines = [line for line in lines if line.x]
        if lines:
            charts.append(_chart(name, title, lines, [], "iterations", ylabel, scale))
    return charts


def _chart(name, title, lines, levels, xlabel, ylabel, scale="zero") -> dict:
    told = [f"{line.label}: from {line.y[0]:.3g} to {line.y[-1]:.3g} at {line.x[-1]:.6g} {xlabel}" for line in lines]
    told += [f"{level.label}: {level.y:.3g}" for level in levels]
    alt = f"{title}. {'; '.join(told)}."
    return {"title": title, "svg": line_chart(name, alt, lines, levels, xlabel, ylabel, scale), "note": None}


def map_charts(places: dict) -> list[dict]:
    """The embedding map before and after, with the same limits."""
    shown = {name: places[name] for name in ("before", "after") if places[name]}
    everything = [point for part in (places["real"], *shown.values()) for kind in part.values() for point in kind]
    limits = []
    for values in zip(*everything, strict=True):
        margin = 0.05 * (max(values) - min(values) or 1)
        limits.append((min(values) - margin, max(values) + margin))
    return [
        {"title": name.capitalize(), "svg": _map_chart(name, places["real"], part, limits), "note": None}
        for name, part in shown.items()
    ]


def _map_chart(name, real, part, limits):
    def draw(axes):
        axes.scatter(*zip(*real["pictures"], strict=True), s=6, color=FAINT, marker="o", label="real pictures")
        axes.scatter(*zip(*real["texts"], strict=True), s=7, color=FAINT, marker="^", label="real captions")
        for ends in zip(part["pictures"], part["texts"], strict=True):
            axes.plot(*zip(*ends, strict=True), color=MUTED, linewidth=0.4, alpha=0.6)
        axes.scatter(*zip(*part["pictures"], strict=True), s=13, color=BLUE, marker="o", label="pictures of the pairs")
        axes.scatter(*zip(*part["texts"], strict=True), s=15, color=ORANGE, marker="^", label="texts of the pairs")

    alt = (
        f"Map of {len(part['pictures'])} pairs {name} distillation, picture and text of a pair joined by a line, "
        f"among {len(real['pictures'])} real validation pairs."
    )
    return scatter_chart(f"map-{name}", alt, draw, limits)
