"""What users run, on a card: an iteration of distill.py, a loop as released, an expert's step, an evaluation."""

import contextlib
import functools
import io
import itertools
import json
import shutil
import statistics
import tempfile
from pathlib import Path

import torch
import transformers

import buffer
import distill
from benchmarks.expert_step import draw_pictures
from benchmarks.gpu_setup import Setup, products_in
from benchmarks.measure import alternate, now
from benchmarks.outer_iteration import Iterations
from data.annotations import Record
from data.augment import Augment, cached_side
from data.demo import make_demo
from data.image_cache import cache_images
from data.pairs import PairDataset, RetrievalSet, pair_loader
from data.transforms import eval_transform, train_transform
from networks.clip_model import ModelFactory
from networks.image_encoder import build_image_encoder
from networks.text_encoder import SHORT_NAMES
from utils.scoring import device_batches, evaluate_retrieval, evaluate_synset
from utils.scoring.training import make_optimizer, train_epoch
from utils.synset import SynSet


def published_command(setup: Setup):
    """distill.py itself, after buffer.py: seconds from one iteration's line in metrics.jsonl to the next."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        prepare = functools.cache(lambda: make_experts(setup, root))
        yield "distill.py", lambda: {"distill.py, no limit": distil(setup, prepare(), root / "run")}
        for limit in setup.sizes.limits[-1:] if setup.on_card else ():

            def limited(limit=limit):
                with setup.limited_to(limit):
                    return {f"distill.py, {limit} GB": distil(setup, prepare(), root / f"run{limit}")}

            yield f"distill.py, {limit} GB", limited


def make_experts(setup: Setup, root: Path) -> list[str]:
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
        *("--num_workers", setup.num_workers, "--buffer_path", root / "buffers", "--disabled_wandb"),
    ]
    rates = ["--lr_teacher_img", "0.01", "--lr_teacher_txt", "0.01"]
    run_script(buffer, [*flags, *rates, "--num_experts", 1, "--train_epochs", 3, "--cache_images"])
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
    sizes = setup.sizes
    if setup.on_card:
        torch.cuda.reset_peak_memory_stats(setup.device)
    published = ["--syn_steps", sizes.steps, "--expert_epochs", 1, "--max_start_epoch", 2, "--num_queries", sizes.pairs]
    published += ["--lr_img", 1000, "--lr_txt", 1000, "--lr_lr", "1e-2"]
    quick = ["--Iteration", sizes.iterations, "--eval_it", 1000, "--num_eval", 1, "--epoch_eval_train", 1]
    quick += ["--lr_teacher_img", "0.01", "--lr_teacher_txt", "0.01", "--no_report", "--draw", "False"]
    out = run_script(distill, [*flags, *published, *quick, "--save_dir", folder])
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    seconds = [line["Seconds"] for line in lines if "Grand_Loss" in line]
    taken = statistics.median(after - before for before, after in itertools.pairwise(seconds))
    chunk = next((line for line in out.splitlines() if "at a time" in line), "all pairs at a time")
    peaks = setup.peaks_so_far() if setup.on_card else {}
    return {"s an iteration": taken, **peaks, "chunk": chunk.split(",")[0].split(" (")[0]}


def run_script(script, arguments: list) -> str:
    """What main(arguments) prints. Raises RuntimeError with its last line of error if it fails."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = script.main([str(argument) for argument in arguments])
    if code:
        raise RuntimeError(f"{script.__name__} ended with {code}: {(err.getvalue().splitlines() or ['no word'])[-1]}")
    return out.getvalue()


def as_released(setup: Setup):
    """The same gradient after building the networks anew and reading the expert's whole file."""

    def measure() -> dict:
        sizes = setup.sizes
        arguments = setup.arguments(pairs=sizes.pairs, steps=sizes.steps, epochs=sizes.expert_epochs)
        with tempfile.TemporaryDirectory() as folder, products_in("tf32"):
            iterations = Iterations(arguments, Path(folder))
            calls = {
                "the gradient alone": iterations.gradient,
                "ours, read ahead": iterations.ours,
                "image encoder built and file read in each": iterations.rebuilding,
                "text encoder built too, as released": iterations.as_released,
            }
            with contextlib.closing(iterations.prefetch):
                iterations.gradient()
                seconds = alternate(list(calls.values()), sizes.repeats, setup.device)
        return {name: {"s": s, "share of the last": s / seconds[-1]} for name, s in zip(calls, seconds, strict=True)}

    yield "tf32", measure


def expert_step(setup: Setup):
    """Whole steps through the project's loader against the same steps on batches that are on the device already."""
    sizes = setup.sizes
    with tempfile.TemporaryDirectory() as folder:
        rows = -(-sizes.batch * sizes.batches // sizes.pictures)

        @functools.cache
        def drawn():
            paths = draw_pictures(Path(folder), sizes.pictures)
            return [Record(path.name, ["a caption"] * rows, path.stem) for path in paths], paths

        def cached():
            augment = Augment(sizes.image_size)
            cache = cache_images(drawn()[1], cached_side(sizes.image_size), folder)
            transform = as_it_is if setup.on_card else augment.one
            return PairDataset(*drawn(), transform, cache), augment if setup.on_card else None

        def decoded(transform):
            return PairDataset(*drawn(), transform), None

        ways = {
            "picture cache": cached,
            "decoded in each step": lambda: decoded(train_transform(sizes.image_size)),
            "decoded, not augmented": lambda: decoded(eval_transform(sizes.image_size)),
        }
        for name, make in ways.items():
            yield name, lambda name=name, make=make: {name: time_expert(setup, *make())}


def as_it_is(image):
    return image


def time_expert(setup: Setup, dataset, augment) -> dict:
    """The first quarter of an epoch warms up: kernels, the loader's processes and what they read ahead."""
    sizes, device = setup.sizes, setup.device
    encoder = build_image_encoder(sizes.encoder, sizes.image_size, pretrained=False)
    model = ModelFactory(lambda: encoder, True, sizes.text_dim, device=device).fresh(0)
    optimizer = make_optimizer(model, 1e-4, 1e-4, momentum=0.0, weight_decay=0.0)
    text_embed = torch.randn(len(dataset), sizes.text_dim)
    loader = pair_loader(dataset, sizes.batch, 0, setup.num_workers, drop_last=True)
    batches = device_batches(loader, text_embed, encoder, device, augment)

    def train(batches) -> float:
        started = now(device)
        train_epoch(model, batches, optimizer, 0.07)
        return now(device) - started

    first = sizes.batches // 4
    count = sizes.batches - 1 - first
    with products_in("tf32"):
        kept = next(batches)
        train(itertools.islice(batches, first))
        seconds = train(itertools.islice(batches, count)) / count
        without_data = train([kept] * count) / count
    return {
        **{"s a step": seconds, "pictures/s": sizes.batch / seconds, "s without data": without_data},
        **{"share that waits for data": 1 - without_data / seconds, "loader processes": setup.num_workers},
    }


def evaluation(setup: Setup):
    """One fresh network trained on a set and tested, as distill.py and evaluate.py do it."""

    def measure() -> dict:
        sizes, device = setup.sizes, setup.device
        encoder = build_image_encoder(sizes.encoder, sizes.image_size, pretrained=False)
        factory = ModelFactory(lambda: encoder, True, sizes.text_dim, device=device)
        generator = torch.Generator().manual_seed(0)
        shape = sizes.pairs, 3, sizes.image_size, sizes.image_size
        images, texts = torch.randn(shape, generator=generator), torch.randn(sizes.pairs, sizes.text_dim)
        synset = SynSet(images, texts, 1e-3, 1e-3, ["a caption"] * sizes.pairs, encoder.mean, encoder.std)
        tests, shape = sizes.test_pictures, (sizes.test_pictures, 3, sizes.image_size, sizes.image_size)
        pictures = torch.randint(256, shape, dtype=torch.uint8, generator=generator)
        captions = torch.arange(tests).repeat_interleave(5)
        retrieval = (
            RetrievalSet(pictures, ["a caption"] * len(captions), captions),
            torch.randn(5 * tests, sizes.text_dim),
        )

        def score(epochs: int):
            evaluate_synset(factory, synset, retrieval, 1, epochs, 64, 128, sizes.image_size, 0.07, seed=0)

        with products_in("tf32"):
            score(1)  # loads kernels
            whole = alternate([lambda: score(sizes.eval_epochs)], 1, device)[0]
            model = factory.fresh(0)
            test = alternate([lambda: evaluate_retrieval(model, *retrieval, 128, device)], 1, device)[0]
        name = f"{sizes.pairs} pairs, {sizes.eval_epochs} epochs, {tests} test pictures"
        return {name: {"s": whole, "of it the test": test}}

    yield "one network", measure
