"""Sets for people and for other programs: folders of pictures with their captions, and files of other methods' form."""

import json
import os
import shutil
from pathlib import Path

import torch
from PIL import Image

from data.errors import InputError
from utils.files import save_tensors, save_torch
from utils.sets.pictures import fit_images, pixels_of
from utils.sets.released import MEAN, STD
from utils.sets.synset import SynSet

KIND = "texts and rates of exported pairs"


def export_sets(folder: str | Path, synsets: dict[str, SynSet]) -> None:
    """Writes each set's pictures, captions, text embeddings and rates; a sub-folder per set where there are several.

    A set's folder holds a PNG for each picture, `metadata.jsonl` with a line {"file_name", "text"} for each (the layout
    of Hugging Face's image folders), and `texts.safetensors`: text_syn [M, D_text], syn_lr_img and syn_lr_txt, with
    captions, mean, std and settings in its metadata. Pixels are rounded to 8 bits. `folder` appears only when
    everything is in it.

    Args:
        synsets: by the name of the sub-folder, which does not matter for one alone.

    Raises:
        InputError: `folder` holds files already, or cannot be written.
    """
    folder = Path(folder).expanduser().absolute()
    building = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    try:
        if folder.exists() and os.listdir(folder):
            raise InputError(f"{folder} holds files already; give an empty or new folder")
        building.mkdir(parents=True)
        for name, synset in synsets.items():
            _write_set(building if len(synsets) == 1 else building / name, synset)
        os.rename(building, folder)
    except OSError as error:
        raise InputError(f"cannot write {folder} ({error.strerror or error}); give another folder") from error
    finally:
        shutil.rmtree(building, ignore_errors=True)


def _write_set(folder: Path, synset: SynSet) -> None:
    folder.mkdir(exist_ok=True)
    lines = []
    for i, (pixels, caption) in enumerate(zip(pixels_of(synset), synset.captions, strict=True)):
        name = f"{i:06d}.png"
        Image.fromarray(pixels).save(folder / name)
        lines.append(json.dumps({"file_name": name, "text": caption}, ensure_ascii=False) + "\n")
    (folder / "metadata.jsonl").write_text("".join(lines), encoding="utf-8")
    rates = {name: torch.tensor(getattr(synset, name)) for name in ("syn_lr_img", "syn_lr_txt")}
    named = {key: getattr(synset, key) for key in ("captions", "mean", "std", "settings")}
    save_tensors(folder / "texts.safetensors", {"text_syn": synset.text_syn, **rates}, {"kind": KIND, **named})


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
