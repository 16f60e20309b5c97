"""Annotation files in the forms that data sets are published in, told apart by what is in them; see docs/files.md.

A row is (its number from 1, the picture's name, its captions, image_id or None, split or None).
"""

import csv
import functools
import io
import json
import os
import random
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from data.errors import InputError

SPLITS = ("train", "val", "test")
# The names of a row's picture and caption: in a table's first line, and in lines or lists of JSON.
COLUMNS = (
    *(("image", "caption"), ("image_name", "comment"), ("filepath", "title")),
    *(("file_name", "text"), ("file_name", "caption"), ("file_name", "captions")),
    *(("image_path", "caption"), ("image_name", "caption"), ("filename", "caption")),
)
OTHER_NAMES = {"restval": "train", "dev": "val", "valid": "val", "validation": "val"}  # of splits
TOKEN = re.compile(r"([^\t]+)#(\d+)\t(.*)")
PIPE_LEFT_OUT = re.compile(r"\s*(\d+)\s+(.*)")  # in a row of Flickr30k's results.csv
NO_PICTURE = re.compile(r"\.\d+$")  # a name in Flickr8k.token.txt that no picture has
# Lists of the pictures of each split, of Flickr8k and of Flickr30k Entities.
LISTS = (
    {"train": "Flickr_8k.trainImages.txt", "val": "Flickr_8k.devImages.txt", "test": "Flickr_8k.testImages.txt"},
    {"train": "train.txt", "val": "val.txt", "test": "test.txt"},
)
PICTURE_ENDINGS = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
HELD_OUT_PARTS, MOST_HELD_OUT = 10, 1000  # of the pictures, for each of validation and test
ENCODING = "utf-8-sig"
HALF_CHARACTER = re.compile("[\ud800-\udfff]")


def parse_json(text: str):
    """json.loads; nesting too deep and numbers too long are a JSONDecodeError too."""
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        raise
    except (RecursionError, ValueError) as error:
        reason = "nested too deep" if isinstance(error, RecursionError) else "a number of too many digits"
        raise json.JSONDecodeError(reason, text, 0) from None


def is_text(value) -> bool:
    """Whether it is a text without half characters, which JSON can write and nothing else."""
    return isinstance(value, str) and not HALF_CHARACTER.search(value)


def read_form(path: Path, split: str | None = None, split_seed: int = 0) -> list[tuple]:
    """The rows of a split, or all of them. A file that names no splits gets them from lists beside it, or by the seed.

    A folder stands for the text files in it, one beside each picture.

    Raises:
        InputError: the file is in no form that is known, in two, or broken.
    """
    if split is None:
        return _rows(path, _text(path))
    status = path.stat()
    rows, split_of = _split_rows(path, split_seed, (status.st_size, status.st_mtime_ns))
    if split_of is None:
        return [row for row in rows if in_split(row[4], split)]
    return [row for row in rows if split_of.get(_name(row)) == split]


def read_split_folder(root: Path, split: str) -> tuple[Path, list[tuple]] | None:
    """The file metadata.jsonl or metadata.csv in a split's own folder, and its rows; None if there is none."""
    folders = [split, *(name for name, of in OTHER_NAMES.items() if of == split)]
    paths = (root / folder / f"metadata{ending}" for folder in folders for ending in (".jsonl", ".csv"))
    path = next((path for path in paths if path.is_file()), None)
    if path is None:
        return None
    return path, [(row[0], f"{path.parent.name}/{row[1]}", *row[2:]) for row in read_form(path)]


def has_texts_beside(root: Path) -> bool:
    """Whether a picture somewhere in the folder has a text file of its name beside it."""
    return any(text.is_file() for _, text in _pictures(root))


def _pictures(root: Path) -> Iterator[tuple[Path, Path]]:
    """Each picture with what its text file is called, in the order of their names."""
    for folder, folders, files in os.walk(root):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for picture in map(Path(folder).joinpath, sorted(files)):
            if picture.suffix.lower() in PICTURE_ENDINGS:
                yield picture, picture.with_suffix(".txt")


def names_splits(path: Path) -> bool:
    """Whether the first line of a table has a column 'split'."""
    _, columns = _table_columns(_first_line(_text(path))) or ("", [])
    return "split" in columns


def in_split(name, split: str) -> bool:
    return isinstance(name, str) and OTHER_NAMES.get(name, name) == split


def is_other_form(path: Path) -> bool:
    """Whether the file is in one of the forms here, and neither a list of rows nor a csv with 'image' and 'caption'."""
    text = _text(path)
    start = text.lstrip()[:1]
    if start not in ("[", "{"):
        first = _first_line(text)
        separator, columns = _table_columns(first) or (",", COLUMNS[0])
        return bool(TOKEN.fullmatch(first)) or separator != "," or COLUMNS[0] not in _fitting(columns)
    try:
        # Of a list, which may be long, the first row tells.
        content = _first_row(text) if start == "[" else parse_json(text)
    except json.JSONDecodeError:
        return start == "{" and _is_object(_first_line(text))
    fitting = _fitting(content) if isinstance(content, dict) else []
    if start == "[":
        return bool(fitting) and COLUMNS[0] not in fitting
    return bool(fitting) or "images" in content


def _first_row(text: str):
    start = re.match(r"\s*\[\s*", text).end()
    try:
        return json.JSONDecoder().raw_decode(text, start)[0]
    except (RecursionError, ValueError):
        return parse_json(text)


def _is_object(text: str) -> bool:
    try:
        return isinstance(parse_json(text), dict)
    except json.JSONDecodeError:
        return False


@functools.lru_cache(maxsize=1)  # the splits of one file are asked for one after the other
def _split_rows(path: Path, split_seed: int, stamp: tuple) -> tuple[list[tuple], dict[str, str] | None]:
    """All rows, and the split of each picture, which a line tells, where the rows do not name it."""
    rows = _beside_rows(path) if path.is_dir() else _rows(path, _text(path))
    if any(row[4] is not None for row in rows):
        return rows, None
    names = {_name(row) for row in rows}
    split_of, way = _splits(path, names, split_seed)
    counts = Counter(split_of.values())
    parts = ", ".join(f"{counts[split]:,} {split}" for split in SPLITS)
    left_out = f", {len(names) - len(split_of):,} in none" if len(split_of) < len(names) else ""
    print(f"{path.name} names no splits; its {len(names):,} pictures are split {way}: {parts}{left_out}")
    return rows, split_of


def _name(row: tuple) -> str:
    return str(row[1]).replace("\\", "/")


def _first_line(text: str) -> str:
    return next((line for line in text.split("\n") if line.strip()), "")


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding=ENCODING)
    except (OSError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"cannot read {path} ({reason}); give a readable UTF-8 file") from error


def _rows(path: Path, text: str) -> list[tuple]:
    start = text.lstrip()[:1]
    if start in ("[", "{"):
        return _json_form(path, text)
    if TOKEN.fullmatch(_first_line(text)):
        return _token_rows(path, text)
    return _table_rows(path, text)


# ---- splits


def _splits(path: Path, names: set[str], split_seed: int) -> tuple[dict[str, str], str]:
    """The split of each picture, and the words for where it is from."""
    folder = path if path.is_dir() else path.parent
    for lists in LISTS:
        there = [name for name in lists.values() if (folder / name).is_file()]
        if there:
            return _listed_splits(folder, path, names, lists, there), f"by {', '.join(there)}"
    held_out = min(MOST_HELD_OUT, max(1, len(names) // HELD_OUT_PARTS))
    if len(names) < len(SPLITS):
        raise InputError(f"{path} has only {len(names)} pictures, too few for three splits; give more")
    drawn = sorted(names)
    random.Random(f"split {split_seed}").shuffle(drawn)
    parts = {"val": drawn[:held_out], "test": drawn[held_out : 2 * held_out], "train": drawn[2 * held_out :]}
    split_of = {name: split for split, part in parts.items() for name in part}
    return split_of, f"by --split_seed {split_seed}"


def _listed_splits(folder: Path, path: Path, names: set[str], lists: dict, there: list[str]) -> dict[str, str]:
    if len(there) < len(lists):
        missing = next(name for name in lists.values() if name not in there)
        raise InputError(f"{there[0]} is in {folder} and {missing} is not; add it, or remove the other lists")
    by_stem = {PurePosixPath(name).stem: name for name in names}  # some lists leave the ending out
    split_of = {}
    for split, list_name in lists.items():
        for line in _text(folder / list_name).split("\n"):
            entry = line.strip().replace("\\", "/")
            name = entry if entry in names else by_stem.get(entry)
            if name is not None and split_of.setdefault(name, split) != split:
                raise InputError(f"{folder / list_name} has {entry}, as the list of {split_of[name]} has; choose")
        if split not in split_of.values():
            raise InputError(f"{folder / list_name} names no picture of {path}; give its lists or remove them")
    return split_of


# ---- a text file beside each picture


def _beside_rows(root: Path) -> list[tuple]:
    """A caption is a line; pictures without one are left out, which a line tells."""
    rows, without = [], []
    for number, (picture, text) in enumerate(_pictures(root), 1):
        lines = _text(text).split("\n") if text.is_file() else []
        captions = [line.strip() for line in lines if line.strip()]
        if captions:
            rows.append((number, picture.relative_to(root).as_posix(), captions, None, None))
        else:
            without.append(picture)
    if without:
        pictures = f"{len(without)} of {len(rows) + len(without)} pictures"
        print(f"warning: left out {pictures} without a caption, the first is {without[0]}")
    return rows


# ---- Flickr8k.token.txt and results_20130124.token


def _token_rows(path: Path, text: str) -> list[tuple]:
    rows = []
    for number, line in enumerate(text.split("\n"), 1):
        found = TOKEN.fullmatch(line)
        if found is None and line.strip():
            raise InputError(f"{path}, line {number}: not NAME#NUMBER, a tab and a caption; repair the line")
        if found and not NO_PICTURE.search(found[1]):
            rows.append((number, found[1].strip(), [found[3]], None, None))
    return rows


# ---- tables


def _table_columns(first: str) -> tuple[str, list[str]] | None:
    """The separator of a table by its first line, and its columns."""
    signs = sorted(set(re.findall(r"[^\w\"'-]", first)), key=lambda sign: (sign == " ", sign))
    for sign in signs:
        columns = [column.strip().strip('"').strip().lower() for column in first.split(sign)]
        if _fitting(columns):
            return sign, columns
    return None


def _fitting(columns) -> list[tuple[str, str]]:
    return [pair for pair in COLUMNS if set(pair) <= set(columns)]


def _one_pair(path: Path, columns, where: str) -> tuple[str, str]:
    fitting = _fitting(columns)
    if len(fitting) > 1:
        both = " and ".join(f"'{image}' with '{caption}'" for image, caption in fitting)
        raise InputError(f"{path}, {where} fits two forms, {both}; keep the names of one of them")
    if not fitting:
        known = ", ".join(f"{image} and {caption}" for image, caption in COLUMNS)
        raise InputError(f"{path}, {where} names no picture with a caption; known are {known}")
    return fitting[0]


def _table_rows(path: Path, text: str) -> list[tuple]:
    separator, columns = _table_columns(_first_line(text)) or (None, [])
    image, caption = (columns.index(name) for name in _one_pair(path, columns, "its first line"))
    split_at = columns.index("split") if "split" in columns else None
    rows = []
    for number, fields in enumerate(_fields(path, text, separator), 0):
        if number == 0 or not any(field.strip() for field in fields):
            continue
        fields = _mended(fields, columns, separator)
        if len(fields) != len(columns):
            raise InputError(f"{path}, row {number}: {len(fields)} columns instead of {len(columns)}; repair the row")
        name_of_split = None if split_at is None else fields[split_at].strip()
        rows.append((number, fields[image].strip(), [fields[caption].strip()], None, name_of_split))
    return rows


def _fields(path: Path, text: str, separator: str) -> list[list[str]]:
    if separator == "|":  # quotes are part of the captions there
        return [line.split(separator) for line in text.split("\n") if line.strip()]
    try:
        lines = io.StringIO(text.lstrip("\r\n"), newline="")
        return [fields for fields in csv.reader(lines, delimiter=separator) if fields]
    except csv.Error as error:
        raise InputError(f"cannot read {path} ({error}); repair the file") from error


def _mended(fields: list[str], columns: list[str], separator: str) -> list[str]:
    """A caption in the last column may hold the separator; a row may lack the one after a caption's number."""
    last = len(columns) - 1
    if len(fields) > len(columns):
        return [*fields[:last], separator.join(fields[last:])]
    left_out = PIPE_LEFT_OUT.fullmatch(fields[-1])
    if len(fields) == last and last == 2 and left_out:
        return [*fields[:-1], *left_out.groups()]
    return fields


# ---- JSON


def _json_form(path: Path, text: str) -> list[tuple]:
    try:
        content = parse_json(text)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data" and text.lstrip().startswith("{"):
            return _object_rows(path, _json_lines(path, text))
        where = f"line {error.lineno}, column {error.colno}"
        raise InputError(f"broken JSON in {path}, {where}: {error.msg}; repair the file") from error
    if isinstance(content, list):
        return _object_rows(path, list(enumerate(content, 1)))
    images = content.get("images")
    if not isinstance(images, list):
        return _object_rows(path, [(1, content)])
    is_karpathy = any(isinstance(image, dict) and "sentences" in image for image in images)
    is_coco = isinstance(content.get("annotations"), list)
    if is_karpathy == is_coco:
        fits = "fits two forms, Karpathy's and COCO's" if is_coco else "has 'images' without captions"
        raise InputError(f"{path} {fits}; keep either 'sentences' of the images or the list 'annotations'")
    return _karpathy_rows(path, images) if is_karpathy else _coco_rows(path, content)


def _json_lines(path: Path, text: str) -> list[tuple]:
    rows = []
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                rows.append((number, parse_json(line)))
            except json.JSONDecodeError as error:
                where = f"line {number}, column {error.colno}"
                raise InputError(f"broken JSON in {path}, {where}: {error.msg}; repair the file") from error
    return rows


def _object_rows(path: Path, numbered: list[tuple]) -> list[tuple]:
    rows = []
    for number, row in numbered:
        image, caption = _one_pair(path, row if isinstance(row, dict) else (), f"row {number}")
        captions = [row[caption]] if isinstance(row[caption], str) else row[caption]
        rows.append((number, row[image], captions, row.get("image_id"), row.get("split")))
    return rows


def _karpathy_rows(path: Path, images: list) -> list[tuple]:
    rows = []
    for number, row in enumerate(images, 1):
        name, sentences = field(path, number, row, "filename"), field(path, number, row, "sentences")
        folder = row.get("filepath", "")
        if not (isinstance(name, str) and isinstance(folder, str) and isinstance(sentences, list)):
            raise InputError(f"{path}, row {number}: 'filename' must be a text and 'sentences' a list")
        captions = [field(path, number, sentence, "raw") for sentence in sentences]
        rows.append((number, str(PurePosixPath(folder, name)), captions, None, field(path, number, row, "split")))
    return rows


def _coco_rows(path: Path, content: dict) -> list[tuple]:
    name_of = {}
    for number, image in enumerate(content["images"], 1):
        image_id = field(path, number, image, "id")
        if not isinstance(image_id, (int, str)):
            raise InputError(f"{path}, row {number}: 'id' must be a number or a text")
        name_of[image_id] = field(path, number, image, "file_name")
    rows = []
    for number, row in enumerate(content["annotations"], 1):
        image_id = field(path, number, row, "image_id")
        if not isinstance(image_id, (int, str)) or image_id not in name_of:
            raise InputError(f"{path}, annotation {number}: no picture with id {image_id} in 'images'; repair the file")
        rows.append((number, name_of[image_id], [field(path, number, row, "caption")], image_id, None))
    return rows


def field(path: Path, number: int, row, key: str):
    if not isinstance(row, dict) or key not in row:
        raise InputError(f"{path}, row {number}: no '{key}'; every row needs one")
    return row[key]
