"""Sets written as folders or in the form of LoRS, as --export and --export_pt ask."""

from pathlib import Path

from data.errors import InputError
from utils.report.folder import read_known
from utils.sets import SynSet, export_released, export_sets, share_out_of_range, shown_text_encoder


def export(synsets: dict[str, SynSet], args, rows: list[dict] = ()) -> None:
    """Writes the sets to --export, or the set to --export_pt.

    Args:
        rows: the sets' numbers, with their paths, if this run scored them; else those of a set's own run are taken.

    Raises:
        InputError: sets that it cannot take, or a place that cannot be written to.
    """
    captioned = [path for path, synset in synsets.items() if synset.is_captioned]
    if captioned:
        raise InputError(f"{captioned[0]} is pictures with captions, without embeddings to export; give a set")
    # The form of LoRS is one file for one set, our own a folder that people can look through.
    if args.export_pt:
        ((path, synset),) = synsets.items()  # `check_export` of utils/cli saw that it is one
        export_released(args.export_pt, synset)
        print(f"{len(synset.captions)} pairs of {path} in {args.export_pt}")
        return
    # Each set has a sub-folder of its file's name.
    by_name = {Path(path).stem: synset for path, synset in synsets.items()}
    if len(by_name) < len(synsets):  # one would overwrite the other
        raise InputError(f"--export {args.export} names sub-folders after files, two of which have one name; rename it")
    text_encoder = shown_text_encoder(args.text_encoder)
    scores = {
        Path(path).stem: [{"text_encoder": text_encoder, **row} for row in rows if row["set"] == path]
        or _scores_of_run(Path(path), synset)
        for path, synset in synsets.items()
    }
    export_sets(args.export, by_name, scores, args.license)
    pairs = sum(len(synset.captions) for synset in synsets.values())
    print(f"{pairs} pairs as pictures, captions and numbers in {args.export}")
    for path, synset in synsets.items():
        if cut := share_out_of_range(synset):
            print(
                f"{path}: {100 * cut:.2g} % of the pixels' values are darker or brighter than a PNG can hold, and cut"
            )


def _scores_of_run(file: Path, synset: SynSet) -> list[dict]:
    """Rows of the test split that the run in whose folder the set lies wrote of it at its end."""
    if file.name != "best.safetensors":
        return []
    rows = [row for row in read_known(file.parent).get("test", []) if str(row.get("set", "")).startswith("best, ")]
    return [
        {"text_encoder": synset.settings.get("text_encoder", "not known"), "texts": "learned", **row} for row in rows
    ]
