"""Sets written as folders or in the form of LoRS, as --export and --export_pt ask."""

from pathlib import Path

from data.errors import InputError
from utils.sets import SynSet, export_released, export_sets, share_out_of_range


def export(synsets: dict[str, SynSet], args) -> None:
    """Writes the sets to --export, or the set to --export_pt. Raises InputError for sets it cannot take."""
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
    export_sets(args.export, by_name)
    pairs = sum(len(synset.captions) for synset in synsets.values())
    print(f"{pairs} pairs as pictures, captions and numbers in {args.export}")
    for path, synset in synsets.items():
        if cut := share_out_of_range(synset):
            print(
                f"{path}: {100 * cut:.2g} % of the pixels' values are darker or brighter than a PNG can hold, and cut"
            )
