"""Where numbers go: wandb (online, offline or off) and metrics.jsonl in the run folder."""

import contextlib
import html
import json
import netrc
import os
import shlex
import time
from collections.abc import Iterator
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from data.errors import InputError
from data.forms import parse_json
from data.whole import clear_leftovers
from utils import ranks
from utils.files import save_text

ID_FILE = "wandb_run_id"
PROJECT = "DatasetDistillation"
WANDB_MODES = ("online", "offline", "disabled", "shared", "run", "dryrun")


class Aside:
    """Blocks that only show a run, and must not end it: what goes wrong within is one warning for each kind."""

    def __init__(self):
        self.told = set()

    @contextlib.contextmanager
    def __call__(self, what: str):
        try:
            yield
        except ranks.RankLost:
            raise
        except Exception as error:
            if what not in self.told:
                reason = (str(error).strip().splitlines() or ["no reason given"])[0]
                tqdm.write(f"warning: {what} left out, the run goes on ({type(error).__name__}: {reason})")
            self.told.add(what)


class Log:
    """One run's log. Every call appends the numbers to metrics.jsonl; media go to wandb alone.

    A folder that was logged to before continues its wandb run, whose id it keeps in a file. wandb takes no step below
    its last one: those that a resumed run repeats are in metrics.jsonl twice and on the dashboard once.

    Args:
        folder: the run folder, made if missing.
        settings: the command line's values, shown on the dashboard.
        name: of the wandb run; None lets wandb choose.
        disabled_wandb: log to metrics.jsonl only.
        fresh: start a new wandb run whatever the folder holds.

    Raises:
        InputError: the folder cannot be written to, or wandb is asked for and not installed or cannot start.
    """

    def __init__(
        self,
        folder: Path,
        settings: dict,
        name: str | None = None,
        disabled_wandb: bool = False,
        fresh: bool = False,
    ):
        mode = None if disabled_wandb else _wandb_mode()
        self.folder, self.aside = folder, Aside()
        try:
            folder.mkdir(parents=True, exist_ok=True)
            clear_leftovers(folder)
            self.started = time.monotonic() - _seconds_before(folder / "metrics.jsonl")
            self.file = (folder / "metrics.jsonl").open("a", buffering=1)
            if not _ends_a_line(folder / "metrics.jsonl"):
                self.file.write("\n")
        except OSError as error:
            raise InputError(f"cannot write into {folder} ({error.strerror}); give another folder") from error
        run_id = None if fresh else _stored_id(folder)
        self.first_step = _last_step(folder / "metrics.jsonl") if run_id else 0  # that wandb takes
        self.run = _start_wandb(folder, settings, name, mode, run_id) if mode else None

    def __call__(self, values: dict, step: int) -> None:
        """Logs scalars (floats, or None for not measured) at `step`, and the seconds that the run has taken."""
        values = {**values, "Seconds": round(time.monotonic() - self.started, 3)}
        self.file.write(json.dumps({"step": step, **values}) + "\n")
        if self.run and step >= self.first_step:
            with self.aside("wandb"):
                self.run.log(values, step=step)

    def media(self, step: int, pictures: dict | None = None, texts: dict | None = None, histograms: dict | None = None):
        """Shows PIL pictures, lists of sentences and tensors' histograms on the dashboard."""
        if not self.run or step < self.first_step:
            return
        import wandb

        with self.aside("wandb's pictures and texts"):
            shown = {name: wandb.Image(picture) for name, picture in (pictures or {}).items()}
            # Captions are anybody's words: a tag in one must not become the page's.
            shown |= {n: wandb.Html("<br>".join(map(html.escape, lines))) for n, lines in (texts or {}).items()}
            shown |= {n: wandb.Histogram(values.float().cpu().numpy()) for n, values in (histograms or {}).items()}
            self.run.log(shown, step=step)

    def final(self, step: int, columns: list[str], rows: list[list], page: Path) -> None:
        """Shows the final table, whose cells may be PIL pictures, and the HTML file `page` on the dashboard."""
        if not self.run:
            return
        import wandb

        with self.aside("wandb's final table"):
            cells = [[wandb.Image(cell) if isinstance(cell, Image.Image) else cell for cell in row] for row in rows]
            table = wandb.Table(columns=columns, data=cells)
            self.run.log({"Final_Table": table, "Report": wandb.Html(page, inject=False)}, step=step)

    def finish(self) -> None:
        self.file.close()
        if not self.run:
            return
        with self.aside("wandb"):
            self.run.finish()
            if self.run.settings.mode == "offline":
                # One folder for each start of the run; wandb sync takes those of one id in order of their start.
                folders = sorted(self.folder.glob(f"wandb/offline-run-*-{self.run.id}"))
                print(f"wandb ran offline; to upload: wandb sync {shlex.join(map(str, folders))}")


class NoLog:
    """A log that keeps nothing: that of all ranks but the first."""

    def __call__(self, values: dict, step: int) -> None:
        pass

    def media(self, *_, **__) -> None:
        pass

    def final(self, *_) -> None:
        pass

    def finish(self) -> None:
        pass


def open_log(*arguments, **named) -> Log | NoLog:
    """The run's log on rank 0, none on the others; the arguments are those of `Log`."""
    return Log(*arguments, **named) if ranks.is_first() else NoLog()


def _stored_id(folder: Path) -> str | None:
    """The id of the wandb run that was logged to from this folder."""
    path = folder / ID_FILE
    return (path.read_text(errors="replace").strip() or None) if path.exists() else None


def _last_step(path: Path) -> int:
    """The highest step in metrics.jsonl, 0 if there is none; a line cut short by a crash does not count."""
    return int(max((line["step"] for line in _lines(path) if isinstance(line.get("step"), int)), default=0))


def _seconds_before(path: Path) -> float:
    """The seconds at the last whole line of an earlier run; 0 if there is none or it did not write them."""
    seconds = [line["Seconds"] for line in _lines(path) if isinstance(line.get("Seconds"), int | float)]
    return seconds[-1] if seconds else 0.0


def _ends_a_line(path: Path) -> bool:
    """Whether what is appended to the file begins a line; not so after one that a full disk cut short."""
    with path.open("rb") as file:
        end = file.seek(0, os.SEEK_END)
        file.seek(max(0, end - 1))
        return file.read() in (b"", b"\n")


def _lines(path: Path) -> Iterator[dict]:
    """The lines of metrics.jsonl; one that an interrupted run did not end, or that is none, is left out."""
    for text in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []:
        with contextlib.suppress(ValueError):
            line = parse_json(text)
            if isinstance(line, dict):
                yield line


def _wandb_mode() -> str:
    mode = os.environ.get("WANDB_MODE") or ("online" if _has_key() else "offline")
    if mode not in WANDB_MODES:
        raise InputError(f"WANDB_MODE={mode} is not one of {', '.join(WANDB_MODES)}; change it or --disabled_wandb")
    return mode


def _start_wandb(folder: Path, settings: dict, name: str | None, mode: str, run_id: str | None):
    try:
        import wandb
    except ImportError as error:
        raise InputError("wandb is not installed; pip install wandb, or pass --disabled_wandb") from error
    try:
        run = wandb.init(
            id=run_id,
            resume="allow",
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=name,
            config=settings,
            dir=folder,
            mode=mode,
            settings=wandb.Settings(silent=True, console="off"),
        )
    except (wandb.Error, ValueError) as error:
        reason = str(error).splitlines()[0]
        anew = f", or remove {folder / ID_FILE} to start a new wandb run" if run_id else ""
        raise InputError(
            f"wandb could not start ({reason}); set WANDB_MODE=offline or pass --disabled_wandb{anew}"
        ) from error
    if mode != "disabled" and run.id != run_id:
        save_text(folder / ID_FILE, f"{run.id}\n")
    return run


def _has_key() -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        return netrc.netrc().authenticators("api.wandb.ai") is not None
    except (OSError, netrc.NetrcParseError):
        return False
