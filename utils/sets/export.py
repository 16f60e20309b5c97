"""Sets for people and for other programs: folders of pictures with their captions, and files of other methods' form."""

import hashlib
import html
import json
import os
import shutil
from pathlib import Path

import torch
from PIL import Image

from data.errors import InputError
from data.whole import clear_leftovers, temporary_beside
from utils.files import save_tensors, save_torch
from utils.sets.folders import (
    ABOUT,
    KIND,
    LINES,
    PARTS,
    SCORED_BY,
    TENSORS,
    TENSORS_KIND,
    WORDS,
    last_names,
    without_paths,
)
from utils.sets.pictures import fit_images, pixels_of
from utils.sets.released import MEAN, STD
from utils.sets.similarity import similarity_names
from utils.sets.synset import SynSet

CARD = """---
{license}configs:
- config_name: default
  data_files: ["metadata.jsonl", "*.png"]
---
# {pairs} pairs of pictures and texts

| | |
|---|---|
| data set | {dataset} |
| method | {method} |
| learned through the image encoder | {image_encoder}, {size} px |
| its weights | {weights} |
| text encoder | {text_encoder}, pooling {pooling} |
| licence | {license_text} |

The pictures of some data sets, Flickr30K and COCO among them, are their owners': pairs that are made from them or show
them are not to be published without the owners' terms.

{what}

{scores}

`metadata.jsonl` has a picture and a caption for each pair: of learned texts the real caption nearest to it.
`texts.safetensors` holds what is trained on: `text_syn` [{pairs}, {width}], embeddings of the frozen text encoder
before a projection{more}. `set.json` says how: the rates of SGD for the image and the text tower (momentum 0.9, weight
decay 5e-4, both × 0.1 after half the epochs), the loss, mean and std of the pixels, epochs and pairs per batch; and
how the pairs were made.

```python
from datasets import load_dataset

pairs = load_dataset("imagefolder", data_dir="FOLDER"{data_files})
```

```
python evaluate.py --synset FOLDER --image_root PICTURES --ann_root ANNOTATIONS
```
"""
OF_PIXELS = "The pictures are PNG files of 8 bits."
OF_MIXTURES = (
    "The pictures are mixtures: rows of `pix_weights` [{pairs}, {pictures}] over the {pictures} real pictures in "
    "`words`, mixed after a frozen image encoder and scaled to the mean norm of its features. The PNG files are those "
    "that the mixtures started from."
)
OF_SENTENCES = (
    " Each text is a weighted sum of few sentences, `sentences` and `weights` of its line in `metadata.jsonl`: any "
    "text encoder gives it from its own embeddings of them."
)


SCORES = """Recall on the test split of networks that trained on these pairs alone, in per cent, mean ± std over them.
Home is an encoder that took part in making the pairs:

| image encoder | text encoder | home | networks | trains | TR@1 | IR@1 | mean of the six |
|---|---|---|---|---|---|---|---|
"""
NO_SCORES = "These pairs were not scored when they were written; `evaluate.py` below scores them."


def export_sets(
    folder: str | Path,
    synsets: dict[str, SynSet],
    scores: dict[str, list[dict]] | None = None,
    license_name: str | None = None,
) -> None:
    """Writes each set as a folder, which `load_synset` reads; a sub-folder per set where there are several.

    A set's folder is as `utils.sets.folders` says, with a PNG for each pair and a README.md beside. Pixels are rounded
    to 8 bits, all else is exact; paths of this machine are left out. `folder` appears only when everything is in it.

    Args:
        synsets: by the name of the sub-folder, which does not matter for one alone.
        scores: rows of numbers of each set by that name, for its card.
        license_name: of the pairs, for their cards.

    Raises:
        InputError: `folder` holds files already, or cannot be written.
    """
    folder = Path(folder).expanduser().absolute()
    building = temporary_beside(folder)
    try:
        check_new_folder(folder)
        building.mkdir(parents=True)
        clear_leftovers(folder.parent)
        for name, synset in synsets.items():
            _write_set(
                building if len(synsets) == 1 else building / name, synset, (scores or {}).get(name, []), license_name
            )
        os.rename(building, folder)
    except OSError as error:
        raise InputError(f"cannot write {folder} ({error.strerror or error}); give another folder") from error
    finally:
        shutil.rmtree(building, ignore_errors=True)


def check_new_folder(folder: str | Path) -> None:
    """Raises InputError if `folder` is a file or holds some."""
    folder = Path(folder).expanduser()
    if folder.exists() and not folder.is_dir():
        raise InputError(f"cannot write {folder} (it is a file); give another folder")
    if folder.exists() and os.listdir(folder):
        raise InputError(f"{folder} holds files already; give an empty or new folder")


def _write_set(folder: Path, synset: SynSet, scores: list[dict], license_name: str | None) -> None:
    folder.mkdir(exist_ok=True)
    lines, texts = [], synset.sentences.texts() if synset.sentences else []
    for i, (pixels, caption) in enumerate(zip(pixels_of(synset), synset.captions, strict=True)):
        line = {"file_name": f"{i:06d}.png", "text": caption}
        if synset.sentences:  # two lists, as the rows of a table may have them
            line |= {"sentences": [term for term, _ in texts[i]], "weights": [weight for _, weight in texts[i]]}
        Image.fromarray(pixels).save(folder / line["file_name"])
        lines.append(json.dumps(line, ensure_ascii=False) + "\n")
    (folder / LINES).write_text("".join(lines), encoding="utf-8")
    tensors = {"text_syn": synset.text_syn}
    tensors |= dict(zip(similarity_names(synset.similarity), synset.similarity, strict=True))
    if synset.mixture:
        tensors["pix_weights"] = synset.mixture.weights.half()
        (folder / WORDS).mkdir()
        for i, word in enumerate(synset.mixture.words):  # as they are: another JPEG file of them would differ
            (folder / WORDS / f"{i:06d}.jpg").write_bytes(word.numpy().tobytes())
    save_tensors(folder / TENSORS, tensors, {"kind": TENSORS_KIND})
    about = _about(synset)
    (folder / ABOUT).write_text(json.dumps(about, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    (folder / "README.md").write_text(_card(synset, about, scores, license_name), encoding="utf-8")


def _about(synset: SynSet) -> dict:
    """What set.json says."""
    settings = without_paths(synset.settings)
    if weights := _digests(synset.settings.get("image_checkpoint")):
        settings["image_weights"] = weights  # a checkpoint has another place elsewhere, its bytes tell which it is
    training = {key: getattr(synset, key) for key in PARTS}
    training |= {name: settings.pop(flag) for name, flag in SCORED_BY.items() if flag in settings}
    return {
        "kind": KIND,
        "pairs": len(synset.captions),
        "pictures": len(synset.mixture.words if synset.mixture else synset.captions),
        "training": training,
        "settings": settings,
        "files": last_names(synset.files),
        "scores": synset.scores,
    }


def _digests(checkpoints) -> dict[str, str]:
    """SHA-256 of the checkpoints that are there, by their last names."""
    files = checkpoints if isinstance(checkpoints, list) else [checkpoints]
    paths = [Path(file).expanduser() for file in files if file]
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in paths if path.is_file()}


def _cell(value) -> str:
    """A setting in a table of Markdown, on one line, as words alone."""
    values = value if isinstance(value, list) else [value]
    return html.escape(", ".join(" ".join(str(part).split()) for part in values)).replace("|", "\\|")


def _scores(rows: list[dict], settings: dict) -> str:
    if not rows:
        return NO_SCORES
    encoders, lines = settings.get("image_encoder", []), []
    encoders = encoders if isinstance(encoders, list) else [encoders]
    for row in rows:
        recalls = [f"{row['mean'][key]:.1f} ± {row['std'][key]:.1f}" for key in ("txt_r1", "img_r1", "r_mean")]
        is_home = row["image_encoder"] in encoders and row["texts"] == "learned"
        names = [row["image_encoder"], row["text_encoder"], "yes" if is_home else "no", row["networks"], row["trains"]]
        lines.append(f"| {' | '.join([*map(_cell, names), *recalls])} |\n")
    return SCORES + "".join(lines).rstrip()


def _card(synset: SynSet, about: dict, scores: list[dict], license_name: str | None) -> str:
    names = {name: name for name in ("method", "dataset", "image_encoder", "text_encoder")}
    names |= {"pooling": "text_pooling", "size": "image_size"}
    made = {name: _cell(about["settings"].get(key, "not known")) for name, key in names.items()}
    digests = about["settings"].get("image_weights", {})
    made["weights"] = _cell([f"{name}, SHA-256 {digest}" for name, digest in digests.items()] or "published or unknown")
    made["license"] = f"license: {license_name}\n" if license_name else ""
    made["license_text"] = license_name or "none was given"
    made["scores"] = _scores(scores, about["settings"])
    sizes = {key: about[key] for key in ("pairs", "pictures")}
    data_files = ', data_files=["metadata.jsonl", "*.png"]' if synset.mixture else ""
    what = (OF_MIXTURES if synset.mixture else OF_PIXELS).format(**sizes) + (OF_SENTENCES if synset.sentences else "")
    more = ", and the parts of the soft targets" if synset.similarity else ""
    width = synset.text_syn.shape[1]
    return CARD.format(**sizes, **made, what=what, more=more, width=width, data_files=data_files)


def export_released(path: str | Path, synset: SynSet) -> None:
    """Writes the set in the form that `utils.sets.released` reads, its pixels normalised as there.

    Hard targets become a full similarity, the identity. The form has no captions, settings, loss or α.

    Raises:
        InputError: the set has phases or mixtures, or the file cannot be written.
    """
    if synset.mixture:
        raise InputError(f"{path} cannot be written: the form holds pixels, and this set's pictures are mixtures")
    if synset.phases > 1:
        raise InputError(f"{path} cannot be written: the form has no phases, and this set has {synset.phases}")
    matrix = torch.eye(len(synset.captions)) if synset.targets is None else synset.targets
    parts = synset.similarity or (matrix,)
    stored = {
        "image": fit_images(synset, synset.image_syn.shape[-1], MEAN, STD),
        "text": synset.text_syn,
        "similarity_params": list(parts),
        "similarity_mat": matrix,
        "syn_lr_img": torch.tensor(synset.syn_lr_img),
        "syn_lr_txt": torch.tensor(synset.syn_lr_txt),
    }
    save_torch(path, stored)
