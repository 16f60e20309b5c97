"""The commands that are ended, on a data set of a few pictures, and what two runs of one must have in common."""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from safetensors import safe_open

import buffer
import distill
import evaluate
from data.demo import make_demo
from utils.files import tensor_bytes

WEIGHTS = Path(__file__).parents[2] / "networks/demo_nfnet.safetensors"
BUFFER = "--train_epochs 3 --batch_size_train 30 --lr_teacher_img 0.01 --num_experts 2 --disabled_wandb"
DISTILL = (
    "--num_queries 4 --mini_batch_size 3 --syn_steps 2 --max_start_epoch 2 --eval_it 2 --num_eval 1 --Iteration 4 "
    "--epoch_eval_train 2 --lr_img 10 --lr_txt 1 --lr_lr 1e-4 --lr_teacher_img 0.01 --disabled_wandb"
)
HEADS = "--image_trainable False --only_has_image_projection"
TWO = f"{HEADS} --image_encoder test_nfnet test_resnet --image_checkpoint none none --no_image_pretrained"
# What names a run and not its numbers.
OF_THE_RUN = {"resume", "save_dir", "Seconds", "seconds", "command"}


@dataclass
class Case:
    """A command whose files all go to one folder, `{run}` among its flags; `{base}` is that of data and experts.

    The same command goes on after it was ended, with `--resume` where distill.py has saved a state. An export that is
    there is whole, and not written over. One that `lacks_lines` may lack some of metrics.jsonl: several ranks log a
    round of experts at its end.
    """

    name: str
    main: Callable
    flags: str
    ranks: int = 1
    lacks_lines: bool = False

    def argv(self, base: Path, run: Path) -> list[str]:
        flags = self.flags.format(base=base, run=run)
        resume = ["--resume"] if list(run.glob("distilled/state.safetensors")) else []
        return [*_shared(base), *flags.split(), *resume] if self.main is not evaluate.main else flags.split()

    @property
    def folder(self) -> str:
        """Of the run in one piece."""
        return re.sub(r"\W+", "_", self.name)

    def is_done(self, run: Path) -> bool:
        return (run / "export").exists()


OWN_BUFFER = "--buffer_path {run}/buffers --cache_dir {run}/cache"
OWN_RUN = "--cache_dir {base}/cache --save_dir {run}/distilled"
SCORED = "distilled/best.safetensors --num_workers 0 --json {run}/numbers.json"
CASES = (
    Case("buffer.py", buffer.main, f"{BUFFER} {OWN_BUFFER} --cache_images"),
    Case("buffer.py, heads, a worker", buffer.main, f"{BUFFER} {OWN_BUFFER} {HEADS} --aug_views 2 --num_workers 1"),
    Case("distill.py, with its page", distill.main, f"{DISTILL} {OWN_RUN} --buffer_path {{base}}/whole"),
    Case(
        "distill.py, heads, average, phases",
        distill.main,
        f"{DISTILL} {OWN_RUN} {HEADS} --buffer_path {{base}}/heads --ema_decay 0.9 --phases 2 --no_report",
    ),
    Case("distill.py, two encoders", distill.main, f"{DISTILL} {OWN_RUN} {TWO} --buffer_path {{base}}/two --no_report"),
    Case(
        "evaluate.py, all outputs",
        evaluate.main,
        f"--synset {{base}}/set/{SCORED} --markdown {{run}}/table.md --report {{run}}/page.html --num_eval 2",
    ),
    Case("evaluate.py, export", evaluate.main, f"--synset {{base}}/of_heads/{SCORED} --export {{run}}/export"),
    Case("buffer.py, two ranks", buffer.main, f"{BUFFER} {OWN_BUFFER}", ranks=2, lacks_lines=True),
    Case("distill.py, two ranks", distill.main, f"{DISTILL} {OWN_RUN} --buffer_path {{base}}/whole --no_report", 2),
    Case("evaluate.py, two ranks", evaluate.main, f"--synset {{base}}/set/{SCORED} --num_eval 2", ranks=2),
)
# What they need: by the name of the folder in `{base}`.
BEFORE = {
    "whole": Case("whole", buffer.main, f"{BUFFER} --buffer_path {{run}} --cache_dir {{base}}/cache"),
    "heads": Case("heads", buffer.main, f"{BUFFER} --buffer_path {{run}} --cache_dir {{base}}/cache {HEADS}"),
    "two": Case("two", buffer.main, f"{BUFFER} --buffer_path {{run}} --cache_dir {{base}}/cache {TWO}"),
    "set": Case("set", distill.main, f"{DISTILL} {OWN_RUN} --buffer_path {{base}}/whole --no_report"),
    "of_heads": Case("of_heads", distill.main, f"{DISTILL} {OWN_RUN} {HEADS} --buffer_path {{base}}/heads --no_report"),
}


def make_data(base: Path) -> None:
    """Writes the data set "tiny": 12 / 4 / 4 pictures of 32 px."""
    make_demo(base / "tiny", num_train=12, num_val=4, num_test=4, image_size=32)
    for split in ("train", "val", "test"):
        (base / f"tiny/demo_{split}.json").rename(base / f"tiny/tiny_{split}.json")


def _shared(base: Path) -> list[str]:
    return (
        f"--dataset tiny --image_root {base}/tiny --ann_root {base}/tiny --image_size 32 --image_encoder test_nfnet "
        f"--image_checkpoint {WEIGHTS} --text_encoder demo --text_pooling mean --num_workers 0 --device cpu"
    ).split()


def contents(run: Path) -> dict[str, object]:
    """What the files of a folder hold, without what names the run; those of `printed` are left out.

    Raises:
        AssertionError: a file is not whole. A name that begins with a dot is of a file that is being written.
    """
    found = {}
    for path in sorted(path for path in run.rglob("*") if path.is_file() and not is_leftover(path)):
        try:
            found[path.relative_to(run).as_posix()] = READERS[path.suffix](path, str(run))
        except Exception as error:
            raise AssertionError(f"{path} is half-written: {error}") from error
    return found


def leftovers(run: Path) -> list[str]:
    """Names of files and folders that should be gone when a command has come to its end."""
    return sorted(path.relative_to(run).as_posix() for path in run.rglob("*") if is_leftover(path))


def is_leftover(path: Path) -> bool:
    return any(part.startswith(".") and len(part) > 2 for part in path.parts[-2:]) or path.suffix == ".lock"


def _tensors(path: Path, run: str) -> tuple[dict, dict]:
    """Metadata, and the type, shape and bytes of each tensor."""
    with safe_open(path, "pt") as file:
        metadata = {key: _json(value, run) for key, value in (file.metadata() or {}).items()}
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, a handle is no dict
    return metadata, {name: (t.dtype, t.shape, tensor_bytes(t).tobytes()) for name, t in tensors.items()}


def _json(text: str, run: str):
    return _without_names(json.loads(text.replace(run, "RUN")))


def _without_names(value):
    if isinstance(value, dict):
        return {key: _without_names(part) for key, part in value.items() if key not in OF_THE_RUN}
    return [_without_names(part) for part in value] if isinstance(value, list) else value


def _lines(path: Path, run: str) -> dict:
    """The last numbers of each step of metrics.jsonl; a resumed run repeats some."""
    text = path.read_text()
    lines = [_json(line, run) for line in text[: text.rfind("\n") + 1].splitlines()]
    return {(line.get("step", n), *sorted(line)): line for n, line in enumerate(lines)}


def _page(path: Path, run: str) -> str:
    text = path.read_text()
    assert text.rstrip().endswith("</html>")
    return ""


def _picture(path: Path, run: str) -> bytes:
    with Image.open(path) as picture:
        return picture.tobytes()


READERS = {
    ".safetensors": _tensors,
    ".json": lambda path, run: _json(path.read_text(), run),
    ".jsonl": _lines,
    ".html": _page,
    ".png": _picture,
    ".npy": lambda path, run: np.load(path).tobytes(),
    ".md": lambda path, run: re.sub(re.escape(run), "RUN", path.read_text()),
}
