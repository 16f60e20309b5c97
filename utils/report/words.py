"""A run in words: what was done, with which settings, how it compares, and which file holds what."""

from pathlib import Path

from utils.report.folder import History
from utils.scoring import BEST_LOOK, mean_text, rates_text
from utils.sets import LEFT_OUT

RECALL_COLUMNS = {
    **{"txt_r1": "TR@1", "txt_r5": "TR@5", "txt_r10": "TR@10"},
    **{"img_r1": "IR@1", "img_r5": "IR@5", "img_r10": "IR@10", "r_mean": "mean"},
}
TABLE_COLUMNS = ["set", "pairs", "image encoder", "rates", "trains", *RECALL_COLUMNS.values()]
ALL_DATA = "all data, the experts"  # what the reader calls the experts
FILES = {
    "best.safetensors": "the best set by validation: pictures, text embeddings, rates, settings",
    "last.safetensors": "the set of the last evaluation or stop",
    "iteration_*.safetensors": "the set at each evaluation",
    "synthetic_images_*.png": "its pictures with captions",
    "state.safetensors": "what --resume continues from",
    "metrics.jsonl": "every number, a line for each iteration and evaluation",
    "report.json": "what this page needs beside them: nearest captions, map, search, final table",
    "wandb": "the run's wandb files",
}


def describe(settings: dict) -> list[str]:
    """Sentences on how a set was made, as far as its settings say."""
    if not str(settings.get("method", "")).startswith(("distilled", "initial")):
        return [f"Real pairs of {settings.get('dataset')}, chosen by {settings.get('method')}."]
    if isinstance(settings.get("image_encoder"), list):
        settings = {**settings, "image_encoder": " or ".join(settings["image_encoder"])}
    told = [
        "{num_queries} pairs of a picture ({image_size} × {image_size} pixels) and a text embedding stand for all "
        f"training pairs of {{dataset}}. They start from {_start(settings)}."
    ]
    told.append(
        "In each iteration a student ({image_encoder} on pictures, a projection of {text_encoder}'s embeddings) starts "
        "at an epoch of an expert below {max_start_epoch} and takes {syn_steps} steps on {pairs_a_step} of the "
        "pairs. The pairs move so that it comes nearer to where the expert was {later} later."
    )
    if settings.get("segments", 1) > 1:
        told.append("An iteration takes the mean over {segments} such students.")
    if settings.get("pix_param") == "mixture":
        told.append("A picture is a mixture of {pix_words} real ones after the encoder: its weights are learned.")
    if settings.get("pix_param") == "pyramid":
        told.append("A picture is learned as the sum of levels of growing resolution.")
    if settings.get("pix_limit"):
        told.append("No pixel, from 0 to 1, goes further than {pix_limit:g} from where it starts.")
    if settings.get("syn_aug"):
        told.append("The student sees the pictures augmented, anew in each iteration: {operations}.")
    if settings.get("txt_param") == "mixture":
        told.append("A text is a sum of at most {txt_terms} sentences with weights.")
    if settings.get("image_only") or settings.get("text_only"):
        told.append(f"Only the {'pictures' if settings.get('image_only') else 'texts'} are learned, and the rates.")
    if settings.get("image_trainable") is False:
        told.append("The image encoder is frozen: the projections alone train, in experts, students and evaluation.")
    if settings.get("optimizer") == "adam":
        told.append(
            "The run has {Iteration} iterations of Adam, at {lr_img:g} standard deviations for pixels and {lr_txt:g} "
            "for texts."
        )
    else:
        told.append("The run has {Iteration} iterations, at rates {lr_img:g} for pixels and {lr_txt:g} for texts.")
    told.append(
        "Every {eval_it} iterations {num_eval} fresh networks train on the pairs for {epoch_eval_train} epochs; "
        "their recall on the validation split is what the curves show, and what the best set is chosen by."
    )
    if settings.get("eval_views"):
        told.append("In an epoch such a network sees a picture as it is or in one of {eval_views} augmented views.")
    epochs = settings.get("expert_epochs")
    later = "an epoch" if epochs == 1 else f"{epochs} epochs"
    batch, number = settings.get("mini_batch_size"), settings.get("num_queries", 0)
    a_step = "all" if batch is None or batch >= number else str(batch)
    operations = ", ".join(settings.get("syn_aug") or [])
    sentences = []
    for sentence in told:
        try:
            made = {"later": later, "pairs_a_step": a_step, "operations": operations}
            sentences.append(sentence.format_map({**settings, **made}))
        except (KeyError, ValueError, TypeError):  # an older set does not say
            continue
    return sentences


def _start(settings: dict) -> str:
    """The first pictures and texts in words, with `{init_set}` where its name belongs."""

    def of(key, noun):
        if settings.get(key) == "noise":
            return f"noise for {noun}"
        if "init_set" in settings.get(LEFT_OUT, {}):  # of an exported folder
            return f"the {noun} of another set"
        return f"the {noun} of {{init_set}}" if settings.get("init_set") else f"real {noun}"

    prototypes = ", of the pairs nearest to the centres of k-means" if settings.get("pix_init") == "kmeans" else ""
    return f"{of('pix_init', 'pictures')} and {of('txt_init', 'texts')}{prototypes}"


def headline(history: History, known: dict) -> list[dict]:
    """The numbers at the top of the page as {label, value}."""
    tiles = []
    if 0 in history.evaluations:
        tiles.append({"label": "initial pairs", "value": _plus_minus(history.evaluations[0])})
    best = history.best()
    if best:
        tiles.append({"label": f"best, iteration {best}", "value": _plus_minus(history.evaluations[best])})
    for row in references(known):
        tiles.append({"label": row["name"], "value": mean_text(row["mean"]["r_mean"], row["std"]["r_mean"])})
    return tiles


def references(known: dict) -> list[dict]:
    """What the pairs are compared with on validation, coresets first: {name, mean, std}."""
    rows = [*known.get("coresets", []), known.get("all_data")]
    return [{**row, "name": row["set"].split("/")[-1].removesuffix(".safetensors")} for row in rows if row]


def _plus_minus(line: dict) -> str:
    std = line.get("Std/r_mean")
    return f"{line['r_mean']:.1f}" if std is None else mean_text(line["r_mean"], std)


def evaluation_rows(history: History) -> list[list[dict]]:
    """The recalls of each evaluation: cells as `table_cells` gives them."""
    return [
        [{"text": str(step), "value": step}]
        + [{"text": f"{line[key]:.1f}", "value": line[key]} for key in RECALL_COLUMNS]
        for step, line in sorted(history.evaluations.items())
    ]


def table_cells(row: dict, with_best_look: bool = False) -> list[dict]:
    """A row of the final table, with the numbers of `evaluate.as_numbers`: {text, value to sort by} by column.

    `with_best_look` adds the mean recall of the best look, empty where there was none.
    """
    rates = row.get("rates", [])
    texts = [
        {"text": row["set"], "value": row["set"]},
        {"text": str(row.get("pairs", "all")), "value": row.get("pairs", 1e12)},
        {"text": row["image_encoder"], "value": row["image_encoder"]},
        {"text": rates_text(rates), "value": rates[0] if rates else -1},
        {"text": row["trains"], "value": row["trains"]},
    ]
    mean, std = row["mean"], row["std"]
    keys = [*RECALL_COLUMNS, *([f"{BEST_LOOK}r_mean"] if with_best_look else [])]
    recalls = [(mean_text(mean[k], std[k]), mean[k]) if k in mean else ("", -1) for k in keys]
    return texts + [{"text": text, "value": value} for text, value in recalls]


def list_files(folder: Path) -> list[dict]:
    """What lies in a run folder as {name, what, size in bytes}; several files of a kind are one entry."""
    entries = []
    for pattern, what in FILES.items():
        found = sorted(folder.glob(pattern))
        if found:
            name = found[0].name if len(found) == 1 else f"{pattern} ({len(found)} files)"
            files = [f for path in found for f in ([path] if path.is_file() else path.rglob("*")) if f.is_file()]
            entries.append({"name": name, "what": what, "size": sum(file.stat().st_size for file in files)})
    return entries
