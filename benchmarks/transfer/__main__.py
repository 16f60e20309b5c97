"""A table of transfer: sets × image encoders × text encoders, test recalls and shares of what experts reach.

    python -m benchmarks.transfer --output F --synset portable=S/best.safetensors kmeans=C/kmeans_100.safetensors \\
        --image_encoder A B C --image_checkpoint a.safetensors none none --image_kwargs A:key=value \\
        --text_encoder T1 T2 --all_data B -- --image_root I --ann_root A

What follows `--` goes to evaluate.py in every cell. A cell is an image encoder and a text encoder: evaluate.py scores
all sets there, with rates chosen on validation from the same candidates for every set, and with --all_data the experts
too. A finished cell is kept: the command goes on where it stopped, and scores a cell anew when sets were added.
"""

import argparse
import json
import sys
from pathlib import Path

from benchmarks.field import run
from benchmarks.transfer.table import draw_shares, table
from utils.files import save_text
from utils.scoring import ALL_DATA
from utils.sets import load_synset, shown_path
from utils.setup import encoder_names


def parse_args(argv=None):
    argv = sys.argv[1:] if argv is None else list(argv)
    own, shared = (argv[: argv.index("--")], argv[argv.index("--") + 1 :]) if "--" in argv else (argv, [])
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--output", type=Path, required=True, help="folder of the cells, table.md, table.json and shares.png")
    add("--synset", nargs="+", required=True, metavar="NAME=FILE", help="sets, with their names in the table")
    add("--image_encoder", nargs="+", required=True)
    add("--image_checkpoint", nargs="+", help="a file for each image encoder, none for published weights")
    add("--image_kwargs", nargs="+", default=[], metavar="ENCODER:key=value")
    add("--text_encoder", nargs="+", required=True)
    add(
        "--grid_img", nargs="+", default=["0.03", "0.1", "0.3"], help="image rates that are tried, beside the sets' own"
    )
    add("--grid_txt", nargs="+", default=["0.03", "0.1", "0.3"], help="text rates")
    add("--num_eval", type=int, default=2, help="networks for each score")
    add("--all_data", metavar="BUFFER_PATH", help="experts of the image encoders and text encoders")
    args = parser.parse_args(own)
    if not all("=" in named for named in args.synset):
        parser.error("--synset takes NAME=FILE for each set")
    if args.image_checkpoint and len(args.image_checkpoint) != len(args.image_encoder):
        parser.error(
            f"--image_checkpoint has {len(args.image_checkpoint)} values for {len(args.image_encoder)} encoders"
        )
    args.synset = dict(named.split("=", 1) for named in args.synset)
    return argparse.Namespace(**vars(args), shared=shared)


def main(argv=None) -> None:
    args = parse_args(argv)
    args.output.mkdir(parents=True, exist_ok=True)
    rows = []
    for text_encoder in args.text_encoder:
        for image_encoder in args.image_encoder:
            rows += [as_cell(row, text_encoder, args) for row in scored(image_encoder, text_encoder, args)]
            save_text(args.output / "table.json", json.dumps(rows, indent=1) + "\n")
            save_text(args.output / "table.md", table(rows) + "\n")
            print(f"{image_encoder}, {text_encoder}: done", flush=True)
    draw_shares(rows, args.output / "shares.png")


def scored(image_encoder: str, text_encoder: str, args) -> list[dict]:
    """evaluate.py's rows of all sets on these encoders, from their file if it holds them."""
    name = f"{image_encoder}_{text_encoder}".replace("/", "--").replace(":", "--")
    folder = args.output / name[-100:]
    folder.mkdir(exist_ok=True)
    file = folder / "evaluation.json"
    files = set(args.synset.values()) | ({ALL_DATA} if args.all_data else set())
    if not file.exists() or not files <= {row["set"] for row in _rows(file, files)}:
        file.unlink(missing_ok=True)
        run("evaluate.py", [*flags(image_encoder, text_encoder, args), "--json", file], folder, file)
    return [row for row in _rows(file, files) if row["set"] in files]


def _rows(file: Path, files: set[str]) -> list[dict]:
    """The rows of evaluate.py's numbers, their sets by the paths that this command gives for them."""
    path_of = {shown_path(path): path for path in files}
    rows = json.loads(file.read_text())["rows"]
    return [{**row, "set": path_of.get(row["set"], row["set"])} for row in rows]


def flags(image_encoder: str, text_encoder: str, args) -> list:
    """Of evaluate.py: all sets on one image encoder and one text encoder."""
    own = [kwarg for kwarg in args.image_kwargs if kwarg.startswith(f"{image_encoder}:")]
    argv = ["--synset", *args.synset.values(), "--image_encoder", image_encoder, "--text_encoder", text_encoder]
    if args.image_checkpoint:
        argv += ["--image_checkpoint", args.image_checkpoint[args.image_encoder.index(image_encoder)]]
    argv += ["--image_kwargs", *own] if own else []
    argv += ["--image_trainable", "False", "--only_has_image_projection", "--num_eval", args.num_eval]
    argv += ["--tune_rates", "--grid_img", *args.grid_img, "--grid_txt", *args.grid_txt]
    argv += ["--all_data", args.all_data] if args.all_data else []
    return [*argv, *args.shared]


def as_cell(row: dict, text_encoder: str, args) -> dict:
    """A row of evaluate.py as a cell of the table: with its name, its text encoder and what took part."""
    cell = {"text_encoder": text_encoder, "image_encoder": row["image_encoder"]}
    cell |= {"mean": row["mean"]["r_mean"], "std": row["std"]["r_mean"]}
    if row["set"] == ALL_DATA:
        return {**cell, "name": ALL_DATA, "took_part": False}
    settings = load_synset(row["set"]).settings
    learned = settings.get("method", "").startswith("distilled")  # real pairs are of no encoder
    took_part = learned and row["image_encoder"] in encoder_names(settings)
    name = next(name for name, path in args.synset.items() if path == row["set"])
    size = {key: row[key] for key in ("pairs", "pictures", "megabytes", "rates", "texts")}
    return {**cell, "name": name, "took_part": took_part, **size}


if __name__ == "__main__":
    main()
