"""Annotation files -> records, one per picture: ALBEF/BLIP JSON, Karpathy JSON, csv, and those of data/forms.py."""

import csv
import http.client
import json
import re
import urllib.request
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from data.errors import InputError
from data.forms import (
    SPLITS,
    field,
    has_texts_beside,
    in_split,
    is_other_form,
    is_text,
    names_splits,
    parse_json,
    read_form,
    read_split_folder,
)
from data.whole import replacing

STEMS = {"flickr": "flickr30k", "coco": "coco_karpathy"}
ENDINGS = (".json", ".csv", ".jsonl", ".tsv")
KARPATHY_NAMES = {"flickr": "flickr30k", "coco": "coco"}
# Names that files are published under; a known data set does not take those of another one.
PUBLISHED = {
    "flickr": ("results.csv", "results_20130124.token"),
    "flickr8k": ("Flickr8k.token.txt",),
    "coco": ("captions_*.json",),
}
USUAL = ("captions.txt", "metadata.jsonl", "metadata.csv")
DOWNLOADS = "https://storage.googleapis.com/sfr-vision-language-research/datasets/"
DOWNLOAD_TIMEOUT = 20  # seconds without an answer
PUNCTUATION = re.compile(r'[.!"()*#:;~]')


@dataclass(frozen=True)
class Record:
    """One picture: its file as the annotations name it, and all its captions, cleaned."""

    image: str
    captions: tuple[str, ...]
    image_id: str


def clean_caption(text: str, max_words: int = 30) -> str:
    """Lower-case, the characters .!"()*#:;~ as spaces, single spaces, at most `max_words` words."""
    return " ".join(PUNCTUATION.sub(" ", text.lower()).split()[:max_words])


def read_split(dataset: str, split: str, ann_root: str | Path, split_seed: int = 0) -> list[Record]:
    """Reads one split of a dataset: one record per picture, in the order of the file.

    Args:
        dataset: flickr, coco, flickr8k, or the stem of the user's own files.
        split: train, val or test.
        ann_root: folder with `{stem}_{split}.json`, `dataset_{name}.json`, `{stem}_{split}.csv` (or .jsonl, .tsv) or
            `{stem}.csv`; the first one found is read. Where there is none, the one file of a usual name, see
            docs/files.md; flickr and coco are downloaded if there is none either. Of a name that is not known any one
            table, or a text file beside each picture. Or that file itself.
        split_seed: of the splits of a file that names none.

    Raises:
        InputError: no such file or folder, nothing downloaded, or a file that is not what it should be.
    """
    root = Path(ann_root).expanduser().absolute()
    if root.is_file():
        return _group(root, read_form(root, split, split_seed))
    stem = STEMS.get(dataset, dataset)
    own = [root / f"{stem}_{split}{ending}" for ending in ENDINGS]
    karpathy, single = root / f"dataset_{KARPATHY_NAMES.get(dataset, dataset)}.json", root / f"{stem}.csv"
    candidates = [own[0], karpathy, *own[1:], single]
    path = next((candidate for candidate in candidates if candidate.is_file()), None)
    if path is None:
        path = _usual_file(dataset, stem, root)
        if path is not None:
            return _group(path, read_form(path, split, split_seed))
        in_folder = read_split_folder(root, split)
        if in_folder is not None:
            return _group(*in_folder)
        if dataset not in PUBLISHED and not _has_own_split(stem, root):
            own_form = _only_table(root) or (root if has_texts_beside(root) else None)
            if own_form is not None:
                return _group(own_form, read_form(own_form, split, split_seed))
    if path is None and dataset in STEMS:
        path = _download(own[0])
    if path is None:
        if not root.is_dir():
            raise InputError(f"no annotation folder {root}; give it with --ann_root, or with both in --image_root")
        names = ", ".join([*(candidate.name for candidate in candidates), *_usual_names(dataset, stem)])
        any_form = "" if dataset in PUBLISHED else ", any one csv, tsv or jsonl, a text file beside each picture"
        raise InputError(
            f"no annotations of '{dataset}' in {root}; looked for {names}{any_form}; give their folder with --ann_root"
        )
    if path == karpathy:
        return _group(path, read_form(path, split, split_seed))
    if path.suffix in (".jsonl", ".tsv") or is_other_form(path) or (path == single and not names_splits(path)):
        return _group(path, read_form(path, split if path == single else None, split_seed))
    return _group(path, _csv_rows(path, split) if path.suffix == ".csv" else _json_rows(path))


def read_sentences(path: str | Path) -> list[str]:
    """Distinct sentences, cleaned as captions are: a text file with one a line, or a .json list of strings.

    Raises InputError if the file cannot be read or holds no sentence.
    """
    path = Path(path).expanduser()
    if path.suffix == ".json":
        sentences = _read_json(path)
        if not isinstance(sentences, list) or not all(map(is_text, sentences)):
            raise InputError(f"{path} is not a list of strings; give one, or a text file with one sentence a line")
    else:
        try:
            sentences = path.read_text(encoding="utf-8-sig").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"cannot read {path} ({_one_line(error)}); give a readable UTF-8 file") from error
    cleaned = [sentence for sentence in dict.fromkeys(map(clean_caption, sentences)) if sentence]
    if not cleaned:
        raise InputError(f"{path} holds no sentence; give a file with one a line, or a .json list of strings")
    return cleaned


def _usual_names(dataset: str, stem: str) -> list[str]:
    published = PUBLISHED.get(dataset, [name for names in PUBLISHED.values() for name in names])
    return [*published, *USUAL, f"{stem}.json", f"{stem}.jsonl", f"{stem}.tsv"]


def _usual_file(dataset: str, stem: str, root: Path) -> Path | None:
    """The one file of a usual name, where no split has a file of its own."""
    if _has_own_split(stem, root):
        return None
    names = _usual_names(dataset, stem)
    paths = [path for name in names for path in (root.glob(name) if "*" in name else [root / name])]
    return _only(sorted({path for path in paths if path.is_file()}), root)


def _has_own_split(stem: str, root: Path) -> bool:
    return any((root / f"{stem}_{split}{ending}").is_file() for split in SPLITS for ending in ENDINGS)


def _only_table(root: Path) -> Path | None:
    """The one table or file of JSON lines in the folder, whatever it is called."""
    return _only(sorted(path for ending in (".csv", ".jsonl", ".tsv") for path in root.glob(f"*{ending}")), root)


def _only(found: list[Path], root: Path) -> Path | None:
    """Raises InputError if there are several."""
    if len(found) > 1:
        raise InputError(
            f"{root} has the annotation files {', '.join(path.name for path in found)}; give one of them as --ann_root"
        )
    return found[0] if found else None


def _download(path: Path) -> Path:
    url = DOWNLOADS + path.name
    try:
        with urllib.request.urlopen(url, timeout=DOWNLOAD_TIMEOUT) as response:
            content = response.read()
        parse_json(content)  # a proxy's login page must not be kept as the annotations
        with replacing(path) as temporary:
            temporary.write_bytes(content)
    except (OSError, http.client.HTTPException, ValueError) as error:
        reason = _one_line(error)
        raise InputError(
            f"cannot download {url} ({reason}); put {path.name} into {path.parent} or set --ann_root"
        ) from error
    return path


def _read_json(path: Path):
    try:
        return parse_json(path.read_text(encoding="utf-8-sig"))
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}"
        raise InputError(f"broken JSON in {path}, {where}: {error.msg}; repair the file") from error
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read {path} ({_one_line(error)}); give a readable UTF-8 file") from error


def _json_rows(path: Path) -> Iterator[tuple]:
    """Yields (row number from 1, image, captions, image_id or None), as the other two readers do."""
    rows = _read_json(path)
    if not isinstance(rows, list):
        raise InputError(f"{path} is not a list of rows; give the ALBEF/BLIP form")
    for number, row in enumerate(rows, 1):
        image, captions = field(path, number, row, "image"), field(path, number, row, "caption")
        yield number, image, [captions] if isinstance(captions, str) else captions, row.get("image_id")


def _csv_rows(path: Path, split: str) -> Iterator[tuple]:
    has_split = path.stem.endswith(f"_{split}")
    needed = ["image", "caption"] if has_split else ["image", "caption", "split"]
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            missing = [name for name in needed if name not in (reader.fieldnames or [])]
            if missing:
                raise InputError(f"{path} has no column '{missing[0]}'; its first line must name the columns")
            for number, row in enumerate(reader, 1):
                if has_split or in_split(row["split"], split):
                    yield number, row["image"], [row["caption"]], row.get("image_id")
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"cannot read {path} ({_one_line(error)}); give a UTF-8 csv file") from error


def _group(path: Path, rows: Iterable[tuple]) -> list[Record]:
    captions_of, id_of = {}, {}
    for number, image, captions, image_id, *_ in rows:
        if not is_text(image) or not image:
            raise InputError(f"{path}, row {number}: 'image' must be the name of a file")
        if not isinstance(captions, list) or not captions or not all(map(is_text, captions)):
            raise InputError(f"{path}, row {number}: 'caption' must be a text or a list of texts")
        image = image.replace("\\", "/")  # as Windows writes them
        captions_of.setdefault(image, []).extend(clean_caption(caption) for caption in captions)
        id_of.setdefault(image, PurePosixPath(image).stem if image_id is None else str(image_id))
    if not captions_of:
        raise InputError(f"no rows of this split in {path}; give a file that has some")
    return [Record(image, tuple(captions), id_of[image]) for image, captions in captions_of.items()]


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
