"""An outer iteration as users run it, on a card: distill.py itself."""

import contextlib
import functools
import io
import itertools
import json
import shutil
import statistics
import tempfile
from pathlib import Path
from unittest import mock

import torch
import transformers

import buffer
import distill
from benchmarks.gpu.profile import Asked
from benchmarks.gpu.setup import Setup
from data.demo import make_demo
from networks.text_encoder import SHORT_NAMES

# An iteration's seconds do not depend on where a step leads, and random weights diverge at the published rates.
STAND_STILL = ["--lr_img", 0, "--lr_txt", 0, "--lr_lr", 0]


def published_command(setup: Setup):
    """distill.py with the published flags, after buffer.py; the outer rates are 0."""
    sizes = setup.sizes
    flags = ["--syn_steps", sizes.steps, "--expert_epochs", 1, "--max_start_epoch", 2, "--num_queries", sizes.pairs]
    yield from as_users_run_it(setup, "distill.py", [], flags, setup.sizes.limits)


def heads_command(setup: Setup):
    """distill.py --recipe heads, four segments of 20 pairs with WBCE, after its buffer.py; the outer rates are 0."""
    pairs = min(99, setup.sizes.pairs)
    flags = ["--syn_steps", setup.sizes.steps, "--num_queries", pairs, "--mini_batch_size", min(20, pairs)]
    yield from as_users_run_it(
        setup, "distill.py --recipe heads", ["--recipe", "heads"], [*flags, "--lr_sim", 0], setup.sizes.limits[-1:]
    )


def as_users_run_it(setup: Setup, name: str, recipe: list, flags: list, limits: tuple[int, ...]):
    """distill.py with all memory and, on a card, under limits in GB, after one call of buffer.py."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        prepare = functools.cache(lambda: make_experts(setup, root, recipe))

        def run(limit: int | None) -> dict:
            argv = [*prepare(), *recipe, *flags]
            setup.rate("tf32")  # before there is a limit
            with setup.limited_to(limit):
                return {f"{name}, {shown(limit)}": distil(setup, argv, root / f"run{limit}")}

        for limit in (None, *(limits if setup.on_card else ())):
            yield f"{name}, {shown(limit)}", functools.partial(run, limit)


def shown(limit: int | None) -> str:
    return f"{limit} GB" if limit else "no limit"


def make_experts(setup: Setup, root: Path, recipe: list) -> list[str]:
    """Draws a data set, makes a text encoder and trains one expert; gives the flags that the scripts share."""
    sizes = setup.sizes
    counts = {"num_train": sizes.train_pictures, "num_val": 20, "num_test": 20}
    make_demo(root / "data", **counts, image_size=64)
    for split in ("train", "val", "test"):
        (root / f"data/demo_{split}.json").rename(root / f"data/drawn_{split}.json")
    flags = [
        *("--dataset", "drawn", "--image_root", root / "data", "--ann_root", root / "data", "--device", setup.device),
        *("--image_encoder", sizes.encoder, "--image_pretrained", "False", "--image_size", sizes.image_size),
        *("--text_encoder", save_text_encoder(root / "text", sizes.text_dim), "--cache_dir", root / "cache"),
        *("--buffer_path", root / "buffers", "--disabled_wandb"),
    ]
    rates = ["--lr_teacher_img", "0.01", "--lr_teacher_txt", "0.01"]
    cached = [] if recipe else ["--cache_images"]
    cached += ["--num_workers", setup.num_workers]
    run_script(buffer, [*flags, *recipe, *rates, *cached, "--num_experts", 1, "--train_epochs", 3])
    return flags


def save_text_encoder(folder: Path, width: int) -> Path:
    """A small BERT of this width, random weights, with the words of the demo."""
    folder.mkdir()
    for name in ("vocab.txt", "tokenizer_config.json"):
        shutil.copy(Path(SHORT_NAMES["demo"]) / name, folder)
    words = len((folder / "vocab.txt").read_text(encoding="utf-8").splitlines())
    size = {"hidden_size": width, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 2 * width}
    transformers.BertModel(transformers.BertConfig(vocab_size=words, **size)).save_pretrained(folder)
    return folder


def distil(setup: Setup, flags: list, folder: Path) -> dict:
    """Seconds from one iteration's line in metrics.jsonl to the next; the last one is counted instead of timed."""
    sizes = setup.sizes
    if setup.on_card:
        torch.cuda.reset_peak_memory_stats(setup.device)
    quick = ["--Iteration", sizes.iterations, "--eval_it", 1000, "--num_eval", 1, "--epoch_eval_train", 1]
    quick += ["--lr_teacher_img", "0.01", "--lr_teacher_txt", "0.01", "--no_report", "--draw", "False"]
    with last_iteration_asked(setup) as asked:
        out = run_script(distill, [*flags, *STAND_STILL, *quick, "--save_dir", folder])
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    seconds = [line["Seconds"] for line in lines if "Grand_Loss" in line]
    taken = statistics.median(after - before for before, after in itertools.pairwise(seconds[:-1]))
    chunk = next((line for line in out.splitlines() if "at a time" in line), "all pairs at a time")
    peaks = setup.peaks_so_far() if setup.on_card else {}
    columns = {"s an iteration": taken, **peaks, "chunk": chunk.split(",")[0].split(" (")[0]}
    return {**columns, **asked.columns(taken)}


@contextlib.contextmanager
def last_iteration_asked(setup: Setup):
    """Gives an `Asked` that is entered and left within distill.py, between the lines of its last two iterations."""
    asked, log = Asked(setup), distill.Distillation.log_iteration
    with contextlib.ExitStack() as stack:

        def log_iteration(run, *values):
            left = run.args.Iteration - run.learner.iteration
            if left == 0:
                stack.close()
            log(run, *values)
            if left == 1:
                stack.enter_context(asked)

        with mock.patch.object(distill.Distillation, "log_iteration", log_iteration):
            yield asked


def run_script(script, arguments: list) -> str:
    """What main(arguments) prints. Raises RuntimeError with its last line of error if it fails."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = script.main([str(argument) for argument in arguments])
    if code:
        raise RuntimeError(f"{script.__name__} ended with {code}: {(err.getvalue().splitlines() or ['no word'])[-1]}")
    return out.getvalue()
