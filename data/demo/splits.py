"""The embedded data set "demo": drawn scenes with captions (data/demo/scenes.py), written on first use."""

import json
import os
import random
import shutil
from pathlib import Path

from tqdm import tqdm

from data.demo.scenes import caption_scene, draw_scene, paint_scene
from data.errors import InputError
from data.whole import clear_leftovers, temporary_beside

VERSION = 1  # of the scenes: a folder written with another one is made anew
SPLITS = ("test", "val", "train")  # in the order of drawing


def make_demo(
    root: str | Path,
    num_train: int = 3000,
    num_val: int = 200,
    num_test: int = 200,
    image_size: int = 64,
    seed: int = 0,
) -> None:
    """Writes demo_{train,val,test}.json and demo-images/*.png, squares of `image_size` pixels, into `root`.

    No two scenes of all the splits have the same description. The test split does not change with the
    size of the others. A folder that is complete with the same settings is left as it is; one of other
    settings or incomplete is made anew. The folder appears only when everything is in it.

    Raises:
        InputError: `root` holds other files, or cannot be written to.
    """
    root = Path(root).expanduser().absolute()
    counts = dict(zip(SPLITS, (num_test, num_val, num_train), strict=True))
    settings = {"version": VERSION, "seed": seed, "image_size": image_size, **counts}
    if _is_complete(root, settings):
        return
    building = temporary_beside(root)
    try:
        _check_replaceable(root)
        (building / "demo-images").mkdir(parents=True)
        clear_leftovers(root.parent)
        _write_splits(building, counts, image_size, random.Random(f"demo {seed}"))
        (building / "demo.json").write_text(json.dumps(settings))
        if not _is_complete(root, settings):  # another process may have been faster
            if root.exists():
                shutil.rmtree(root)
            os.rename(building, root)
    except OSError as error:
        reason = error.strerror or error
        raise InputError(f"cannot write the demo data to {root} ({reason}); give another folder") from error
    finally:
        shutil.rmtree(building, ignore_errors=True)


def _is_complete(root, settings):
    try:
        if json.loads((root / "demo.json").read_text()) != settings:
            return False
        pictures = len(os.listdir(root / "demo-images"))
    except (OSError, ValueError):
        return False
    expected = sum(settings[split] for split in SPLITS)
    return pictures == expected and all((root / f"demo_{split}.json").is_file() for split in SPLITS)


def _check_replaceable(root):
    if not root.exists():
        return
    own = {"demo.json", "demo-images", *(f"demo_{split}.json" for split in SPLITS)}
    entries = set(os.listdir(root)) if root.is_dir() else {root.name}
    if entries and not ("demo.json" in entries and entries <= own):
        raise InputError(f"{root} holds other files than the demo data; give an empty or new folder")


def _write_splits(folder, counts, image_size, rng):
    seen = set()
    for split, count in counts.items():
        rows = []
        for i in tqdm(range(count), desc=f"drawing scenes, {split}", leave=False, disable=None):
            scene = draw_scene(rng)
            while scene in seen:
                scene = draw_scene(rng)
            seen.add(scene)
            image_id = f"{split}_{i:05d}"
            image = f"demo-images/{image_id}.png"
            paint_scene(scene, image_size, rng).save(folder / image, compress_level=1)
            captions = caption_scene(scene, rng)
            if split == "train":  # one row per caption, as in the published files
                rows += [{"image": image, "caption": caption, "image_id": image_id} for caption in captions]
            else:
                rows.append({"image": image, "caption": captions})
        (folder / f"demo_{split}.json").write_text(json.dumps(rows, indent=0))
