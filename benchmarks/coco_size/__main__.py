"""A data set of COCO's size, and what each script takes of the host: seconds and memory.

    python -m benchmarks.coco_size --make FOLDER
    python -m benchmarks.coco_size --measure FOLDER

113,287 pictures of training with 566,747 captions; 5,000 with 25,010 for each of validation and test. Pictures are
noise of 32 px, captions ten or eleven words drawn from the demo's, all in files of their own and in the form of ALBEF,
which coco is downloaded in. The encoders are as wide as nfnet_l0 and BERT, 2304 and 768, and small: timm's test_nfnet
and a BERT without layers, drawn at random. So the widths, on which memory depends, are real, and the time that real
encoders would take is left out.

Every script runs in a process of its own, the caches are those of the scripts before it. Experts for distill.py are
trained on a hundredth of the pairs; --epochs is how many buffer.py trains one for on all of them, 0 for none.
"""

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.coco_size.make import SIDE, SIZES, WIDE, make
from benchmarks.measure import table
from data.annotations import read_split
from data.pairs import PairDataset, find_images

ROOT = Path(__file__).parents[2]
SMALL = 0.01
METHODS = "herding", "kcenter", "kmeans", "prototypes"
QUICK = ["--num_eval", "1", "--epoch_eval_train", "5"]


def flags(folder: Path, encoders: Path) -> list[str]:
    """Data and encoders of a folder that `make` wrote; the encoders are those of another one."""
    kwargs = [f"{key}={value}" for key, value in WIDE.items()]
    return [
        *("--dataset", "coco", "--image_root", f"{folder}/pictures", "--ann_root", f"{folder}/annotations"),
        *("--image_encoder", "test_nfnet", "--image_kwargs", *kwargs, "--image_size", f"{SIDE}"),
        *("--image_checkpoint", f"{encoders}/wide_nfnet.safetensors", "--text_encoder", f"{encoders}/wide_bert"),
        *("--text_pooling", "mean", "--cache_dir", f"{folder}/cache", "--device", "cpu"),
    ]


def run(*command: str) -> tuple[float, float]:
    """Seconds of a script, and the most GB that it had in memory, files that it maps included."""
    start = time.perf_counter()
    process = subprocess.Popen([sys.executable, *command], cwd=ROOT)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{' '.join(command)} failed")
    return time.perf_counter() - start, usage.ru_maxrss * 1024 / 1e9


def measure(folder: Path, epochs: int, pairs: int) -> list[list[str]]:
    """Rows of the table."""
    small, buffers, sets = (folder / name for name in ("small", "buffers", "sets"))
    if not small.exists():
        make(small, SMALL)
    train = ["--recipe", "heads", "--num_experts", "1", "--disabled_wandb", "--buffer_path"]
    run("buffer.py", *flags(small, folder), *train, str(buffers), "--train_epochs", "3")
    scripts = {"reading annotations, listing pairs": ("-m", "benchmarks.coco_size", "--read", str(folder))}
    if epochs:
        scripts["buffer.py"] = "buffer.py", *train, str(folder / "full_buffers"), "--train_epochs", str(epochs)
    for method in METHODS:
        chosen = "--recipe", "heads", "--num_queries", str(pairs), "--save_dir", str(sets)
        scripts[f"coreset.py --method {method}"] = "coreset.py", "--method", method, *chosen
    learned = folder / "run"
    quick = *QUICK, "--Iteration", "2", "--eval_it", "2", "--save_dir", str(learned), "--disabled_wandb"
    scripts["distill.py"] = "distill.py", "--recipe", "heads", "--buffer_path", str(buffers), *quick
    both = str(learned / "best.safetensors"), f"{sets}/kmeans_{pairs}.safetensors"
    scripts["evaluate.py"] = "evaluate.py", "--synset", *both, *QUICK
    rows = []
    for name, command in scripts.items():
        own = [] if command[0] == "-m" else flags(folder, folder)
        seconds, memory = run(*command, *own)
        rows.append([name, f"{seconds:.0f} s", f"{memory:.1f} GB"])
        print(table(("script", "time", "memory"), rows[-1:]), flush=True)
    return rows


def read(folder: Path) -> None:
    """What every script does before it encodes anything."""
    for split in SIZES:
        records = read_split("coco", split, folder / "annotations")
        PairDataset(records, find_images(records, folder / "pictures"), None)


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    for name, words in (("make", "write the data set"), ("measure", "run every script on it"), ("read", "read it")):
        what.add_argument(f"--{name}", type=Path, metavar="FOLDER", help=words)
    parser.add_argument("--epochs", type=int, default=1, help="of an expert of buffer.py on all pairs")
    parser.add_argument("--pairs", type=int, default=100, help="that coreset.py chooses")
    return parser.parse_args(argv)


def main(argv=None) -> None:
    args = parse_args(argv)
    if args.make:
        make(args.make.absolute())
    elif args.read:
        read(args.read)
    else:
        print(table(("script", "time", "memory"), measure(args.measure.absolute(), args.epochs, args.pairs)))


if __name__ == "__main__":
    main()
