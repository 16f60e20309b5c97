"""Expert trajectories on disk: one file per expert, snapshots of every trained parameter after some epochs."""

import glob
import pickle
from pathlib import Path

import torch

from data.errors import InputError
from networks.loss import LEARNED, LOGIT
from utils.experts.snapshots import misfit, open_start, pack_snapshots, save_start, unpack
from utils.files import open_tensors, save_tensors

KIND = "expert trajectory"
MUST_AGREE = (
    *("image_encoder", "text_encoder", "text_pooling", "image_size", "image_trainable", "only_has_image_projection"),
)
LORA = ("lora_rank", "lora_alpha", "lora_layers", "lora_train")  # None where all weights train


def buffer_folder(buffer_path: str | Path, settings: dict) -> Path:
    """Where experts are written: buffer_path / dataset / image encoder / text encoder.

    In names / becomes --, and so does the : of torchvision:NAME, which Windows has no files with.
    The image encoder's name ends in _loraR for adapters, in _projected with an image projection, in _heads if that
    is all that trains of the image tower.
    """
    keys = "dataset", "image_encoder", "text_encoder"
    dataset, image, text = (str(settings[key]).strip("/").replace("/", "--") for key in keys)
    image = image.replace(":", "--")
    if settings.get("lora_rank"):
        image += f"_lora{settings['lora_rank']}"
    if settings.get("only_has_image_projection"):
        image += "_projected" if settings["image_trainable"] else "_heads"
    return Path(buffer_path, dataset, image, text)


def expert_path(folder: Path, number: int) -> Path:
    return folder / f"expert_{number:03d}.safetensors"


def save_trajectory(
    path: str | Path,
    snapshots: list[dict[str, torch.Tensor]],
    settings: dict,
    recalls: list[dict],
    epochs: list[int] | None = None,
    snapshot_type: str = "fp32",
    shares_start: bool = False,
) -> None:
    """Writes snapshots θ*_e of one expert.

    Args:
        snapshots: the trained parameters by name, before training first.
        settings: of the run that trained it, JSON-able.
        recalls: validation recalls after each epoch.
        epochs: of the snapshots, 0 first; 0, 1, 2 … if not given.
        snapshot_type: "fp32" stores values, "fp16" differences to θ*_0, see `utils.experts.snapshots`.
        shares_start: the image tower of θ*_0 goes to a file that the folder's experts have in common.

    Raises:
        InputError: a file cannot be written; what stood there before remains.
    """
    path = Path(path)
    by_epoch = dict(zip(epochs or range(len(snapshots)), snapshots, strict=True))
    tensors, scales = pack_snapshots(by_epoch, snapshot_type)
    metadata = {"kind": KIND, "settings": settings, "recalls": recalls, "scales": scales}
    shared = [key for key in tensors if key.startswith("0/image_encoder.")] if shares_start else []
    if shared:
        metadata["start"] = save_start(path.parent, {key: tensors.pop(key) for key in shared})
    save_tensors(path, tensors, metadata)


class Trajectory:
    """One expert's file; reads single snapshots.

    Attributes:
        epochs: of the snapshots that are stored, ascending from 0.
        settings, recalls: as given to `save_trajectory`.

    Raises:
        InputError: the file, or what it starts from, is missing, damaged or not one of ours.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        handle, metadata = open_tensors(path, KIND, ("settings", "recalls"))
        self.settings, self.recalls = metadata["settings"], metadata["recalls"]
        self.scales = metadata.get("scales", {})
        if not isinstance(self.settings, dict):
            raise InputError(f"{KIND} {path} has settings that are no table of names and values; make it again")
        if not (isinstance(self.recalls, list) and all(isinstance(each, dict) for each in self.recalls)):
            raise InputError(f"{KIND} {path} has recalls that are no list of one for each epoch; make it again")
        self.handles = dict.fromkeys(handle.keys(), handle)  # by "epoch/name"
        if "start" in metadata:
            start = open_start(self.path, str(metadata["start"]))
            self.handles |= dict.fromkeys(start.keys(), start)
        if problem := misfit(self.handles, self.scales):
            raise InputError(f"{KIND} {path} {problem}; make it again")
        self.epochs = sorted({int(key.partition("/")[0]) for key in self.handles})

    def names(self) -> set[str]:
        return {key.partition("/")[2] for key in self.handles}

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of the parameters by name, without reading one."""
        return {
            key[2:]: tuple(handle.get_slice(key).get_shape())
            for key, handle in self.handles.items()
            if key.startswith("0/")
        }

    def snapshot(self, epoch: int) -> dict[str, torch.Tensor]:
        """θ*_epoch by parameter name, on the CPU."""
        prefix = f"{epoch}/"
        named = {key[len(prefix) :]: self._read(key) for key in self.handles if key.startswith(prefix)}
        return _finite(named, self.path, epoch)

    def _read(self, key: str) -> torch.Tensor:
        stored = self.handles[key].get_tensor(key)
        if key not in self.scales:
            return stored
        first = "0/" + key.partition("/")[2]
        return unpack(self.handles[first].get_tensor(first), stored, self.scales[key])


def _finite(named: dict[str, torch.Tensor], path: Path, epoch: int) -> dict[str, torch.Tensor]:
    """The snapshot. Raises InputError if a value is infinite or not a number, which a sum shows quickest."""
    for name, value in named.items():
        if not (value.sum(dtype=torch.float32).isfinite() or value.isfinite().all()):  # a sum may overflow
            raise InputError(
                f"expert {path}: {name} after epoch {epoch} has values that are not finite; train it again with lower "
                "--lr_teacher_img and --lr_teacher_txt, or leave it out"
            )
    return named


class ReleasedTrajectory:
    """One trajectory of the authors' released layout: lists of parameters in the order of the module.

    `img_replay_buffer_n.pt` holds trajectories, each a list of snapshots, each a list of tensors;
    `txt_replay_buffer_n.pt` the same for the text projection. Read memory-mapped, weights only.
    """

    settings, recalls = {}, []

    def __init__(self, path: Path, image_snapshots: list, text_snapshots: list, names: list[str]):
        self.path, self.ordered_names = path, names
        self.image_snapshots, self.text_snapshots = image_snapshots, text_snapshots
        self.epochs = list(range(min(len(image_snapshots), len(text_snapshots))))

    def names(self) -> set[str]:
        stored = len(self.image_snapshots[0]) + len(self.text_snapshots[0])
        return set(self.ordered_names) if stored == len(self.ordered_names) else {f"{stored} unnamed parameters"}

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(value.shape) for name, value in self.snapshot(0).items()}

    def snapshot(self, epoch: int) -> dict[str, torch.Tensor]:
        values = [value.float() for value in (*self.image_snapshots[epoch], *self.text_snapshots[epoch])]
        return _finite(dict(zip(self.ordered_names, values, strict=True)), self.path, epoch)


def find_trajectories(
    buffer_path: str | Path,
    settings: dict,
    parameters: dict[str, torch.Tensor],
    max_files: int | None = None,
    max_experts: int | None = None,
) -> list[Trajectory | ReleasedTrajectory]:
    """Opens every expert in the buffer, in our layout or the released one.

    Args:
        buffer_path: the folder given to buffer.py, or the one the files lie in.
        settings: of this run; an expert made with other encoders, sizes, adapters or `lora_base` is refused.
        parameters: the trained parameters of the model that will follow, image tower first; for those of the loss see
            `check_loss`.
        max_files: read at most so many files.
        max_experts: read at most so many experts of each file (the released layout packs several).

    Raises:
        InputError: no expert in any of the folders tried, a damaged file, or one that does not fit.
    """
    folders = [*_folders(buffer_path, settings), *_with_other_heads(buffer_path, settings)]
    for folder in folders:
        found = [Trajectory(path) for path in sorted(folder.glob("expert_*.safetensors"))[:max_files]]
        if not found:
            found = _read_released(folder, [n for n in parameters if n not in LOGIT], max_files, max_experts)
        if found:
            for trajectory in found:
                _check_fit(trajectory, settings, parameters)
            return found
    tried = ", ".join(str(folder) for folder in folders)
    raise InputError(f"no expert found in --buffer_path (tried {tried}); run buffer.py with the same encoders first")


def check_epochs(
    experts, max_start_epoch: int, expert_epochs: int, phases: int = 1, shortcut: int | None = None
) -> None:
    """Raises InputError if an expert lacks a snapshot that matching reads.

    Args:
        phases: see `phase_rows`; each starts an epoch later than the one before it.
        shortcut: last epoch of the `Shortcut` of the experts that is matched, if one is.
    """
    starts = phases - 1 + max_start_epoch
    last = starts - 1 + expert_epochs
    if shortcut is not None and last > shortcut:
        raise InputError(f"--shortcut {shortcut} ends before epoch {last}, which students are to reach; give {last}")
    needed = {*range(starts), *range(expert_epochs, last + 1), *range(shortcut + 1 if shortcut else 0)}
    for expert in experts:
        missing = sorted(needed - set(expert.epochs))
        if missing:
            given = {"expert_epochs": expert_epochs, "phases": phases if phases > 1 else None, "shortcut": shortcut}
            flags = ", ".join(f"--{name} {value}" for name, value in given.items() if value)
            missing, kept = (", ".join(map(str, epochs)) for epochs in (missing, expert.epochs))
            raise InputError(
                f"{expert.path} lacks the snapshots of epochs {missing} that --max_start_epoch {max_start_epoch} with "
                f"{flags} reads (it has {kept}); lower one of them, or train experts with --keep_epochs {max(needed)}"
            )


def check_loss(experts, loss_type: str) -> None:
    """Raises InputError if a student of `loss_type` learns a scale and a bias and an expert did not, or reversed."""
    for expert in experts:
        trained_with = expert.settings.get("loss_type", "InfoNCE")
        if LEARNED.get(trained_with) != LEARNED.get(loss_type):
            learns, not_so = (trained_with, loss_type) if trained_with in LEARNED else (loss_type, trained_with)
            raise InputError(
                f"expert {expert.path} was trained with --loss_type {trained_with}, this run has --loss_type "
                f"{loss_type}, but {learns} learns a scale and a bias and {not_so} does not; give --loss_type "
                f"{trained_with}, or train experts with buffer.py --loss_type {loss_type} in another --buffer_path"
            )


def stored_lora(buffer_path: str | Path, settings: dict) -> dict:
    """How the experts that a run with `settings` would follow were adapted; empty if all their weights trained.

    Raises:
        InputError: experts of several ranks and no lora_rank in `settings`, or a damaged file.
    """
    patterns = "expert_*.safetensors", "img_replay_buffer_*.pt"
    files = [[path for p in patterns for path in sorted(f.glob(p))] for f in _folders(buffer_path, settings)]
    first_files = [found[0] for found in files if found]
    if not first_files or first_files[0].suffix == ".pt":
        return {}
    stored = Trajectory(first_files[0]).settings
    if stored.get("lora_rank") is None:
        return {}
    if settings.get("lora_rank") is None and len(first_files) > 1:
        names = ", ".join(path.parent.parent.name for path in first_files)
        raise InputError(f"--buffer_path {buffer_path} holds experts of several ranks ({names}); give --lora_rank")
    return {key: stored[key] for key in LORA}


def _folders(buffer_path, settings: dict) -> list[Path]:
    """Where experts may lie; last those adapted in another way, for an error that says so."""
    own = buffer_folder(buffer_path, settings)
    whole = buffer_folder(buffer_path, {**settings, "lora_rank": None})
    adapted = sorted(whole.parent.parent.glob(f"{glob.escape(whole.parent.name)}_lora*/{glob.escape(whole.name)}"))
    return list(dict.fromkeys([own, own.parent.parent, Path(buffer_path), whole, *adapted]))


def _with_other_heads(buffer_path, settings: dict) -> list[Path]:
    """Where experts with or without an image projection lie, for an error that says so."""
    encoder = {**settings, "lora_rank": None}
    kinds = (True, False), (True, True), (False, True)
    other = [{**encoder, "only_has_image_projection": heads, "image_trainable": trains} for heads, trains in kinds]
    return [folder for folder in (buffer_folder(buffer_path, s) for s in other) if folder.is_dir()]


def _read_released(folder: Path, names, max_files, max_experts) -> list[ReleasedTrajectory]:
    found = []
    for image_path in sorted(folder.glob("img_replay_buffer_*.pt"))[:max_files]:
        text_path = image_path.with_name(image_path.name.replace("img", "txt", 1))
        try:
            images = torch.load(image_path, weights_only=True, mmap=True, map_location="cpu")
            texts = torch.load(text_path, weights_only=True, mmap=True, map_location="cpu")
            experts = list(zip(images, texts, strict=True))[:max_experts]
            found += [ReleasedTrajectory(image_path, image, text, names) for image, text in experts]
        except (OSError, RuntimeError, ValueError, TypeError, pickle.UnpicklingError) as error:
            reason = str(error).splitlines()[0]
            raise InputError(f"expert {image_path} or {text_path.name} cannot be read ({reason})") from error
    return found


def _check_fit(trajectory, settings: dict, parameters: dict[str, torch.Tensor]) -> None:
    for key in MUST_AGREE:
        stored = trajectory.settings.get(key, settings.get(key))
        if stored != settings.get(key):
            raise InputError(
                f"expert {trajectory.path} was trained with {key}={stored}, this run has {key}={settings[key]}; "
                "give the same value or another --buffer_path"
            )
    _check_lora(trajectory, settings)
    shapes = {name: tuple(value.shape) for name, value in parameters.items() if name not in LOGIT}
    stored = {}
    if trajectory.names() - set(LOGIT) == set(shapes):
        stored = {name: shape for name, shape in trajectory.shapes().items() if name not in LOGIT}
    if stored != shapes:
        raise InputError(
            f"expert {trajectory.path} holds other parameters than this run's model trains "
            f"({len(trajectory.names())} against {len(shapes)}, or of other shapes); use the encoders it was made with"
        )


def _check_lora(trajectory, settings: dict) -> None:
    stored = {key: trajectory.settings.get(key) for key in (*LORA, "lora_base")}
    if stored["lora_rank"] is None and settings.get("lora_rank") is not None:
        raise InputError(
            f"expert {trajectory.path} trained whole, this run trains adapters of rank {settings['lora_rank']}; "
            "leave --lora_rank out or train experts with it"
        )
    if stored["lora_rank"] is not None and settings.get("lora_rank") is None:
        rank = stored["lora_rank"]
        raise InputError(f"expert {trajectory.path} holds adapters of rank {rank}; give --lora_rank {rank}")
    for key in LORA:
        if stored[key] != settings.get(key):
            raise InputError(
                f"expert {trajectory.path} was trained with {key}={stored[key]}, this run has {key}={settings[key]}; "
                "give the same value or another --buffer_path"
            )
    if stored["lora_base"] and stored["lora_base"] != settings.get("lora_base"):
        raise InputError(
            f"expert {trajectory.path} was trained over other frozen weights (SHA-256 "
            f"{str(stored['lora_base'])[:12]}) than "
            f"this run's image encoder has ({str(settings.get('lora_base'))[:12]}); give the --image_checkpoint, "
            "--image_pretrained and --image_kwargs it was trained with"
        )
