"""Draws pairs before and after distillation, one above the other, from two sets of one run.

    python -m benchmarks.picture_pairs runs/demo/iteration_000000.safetensors runs/demo/best.safetensors pairs.png

The third row shows how far the pixels went; see `before_and_after` in utils/sets/pictures.py.
"""

import argparse
import sys
from pathlib import Path

from data.errors import InputError
from utils import cli
from utils.sets import before_and_after, load_synset


def parse_args(argv=None):
    about, formatter = __doc__, argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="benchmarks.picture_pairs", description=about, formatter_class=formatter)
    parser.add_argument("before", help="set of pairs that the run started with")
    parser.add_argument("after", help="set of pairs of a later iteration")
    parser.add_argument("output", type=Path, help="PNG file to write")
    parser.add_argument("--count", type=cli.count, default=5, help="draw so many pairs, the first ones")
    return parser.parse_args(argv)


@cli.one_line_errors
def main(argv=None):
    args = parse_args(argv)
    page = before_and_after(load_synset(args.before), load_synset(args.after), args.count)
    try:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        page.save(args.output, format="PNG", optimize=True)
    except OSError as error:
        raise InputError(f"cannot write {args.output} ({error.strerror}); give another file") from error


if __name__ == "__main__":
    sys.exit(main())
