"""The pairs under distillation: their optimizer, how far they are, and the state a run resumes from."""

import math

import torch

from data.errors import InputError
from utils.files import open_tensors, save_tensors
from utils.matching.pairs import Pairs

KIND = "distillation state"
NAMES = ("image_syn", "text_syn", "syn_lr_img", "syn_lr_txt")
MIN_RATE = 1e-4  # learned rates are clamped here, so that they stay positive


class PairLearner:
    """Moves the pairs by SGD with momentum 0.5, a rate for pixels, for texts and for the learned rates.

    Attributes:
        pairs: the current `Pairs`.
        iteration: steps taken.
        evaluated: iteration of the last evaluation, -1 before the first.
        best: best validation recall so far.
    """

    def __init__(self, pairs: Pairs, lr_img: float, lr_txt: float, lr_lr: float):
        self.pairs = pairs
        self.iteration, self.evaluated, self.best = 0, -1, -math.inf
        self.named = dict(zip(NAMES, (tensor.requires_grad_() for tensor in pairs.tensors()), strict=True))
        rates = (lr_img, lr_txt, lr_lr, lr_lr)
        groups = [{"params": [tensor], "lr": lr} for tensor, lr in zip(self.named.values(), rates, strict=True)]
        self.optimizer = torch.optim.SGD(groups, lr=0.0, momentum=0.5)

    def step(self, gradient: Pairs) -> None:
        for tensor, grad in zip(self.named.values(), gradient.tensors(), strict=True):
            tensor.grad = grad
        self.optimizer.step()
        with torch.no_grad():
            self.pairs.syn_lr_img.clamp_(min=MIN_RATE)
            self.pairs.syn_lr_txt.clamp_(min=MIN_RATE)
        self.iteration += 1

    def is_finite(self) -> bool:
        return all(torch.isfinite(tensor).all() for tensor in self.named.values())

    def save(self, path, settings: dict) -> None:
        """Writes pairs, momentum and progress. Raises InputError if the file cannot be written."""
        tensors = dict(self.named)
        for name, tensor in self.named.items():
            if "momentum_buffer" in self.optimizer.state[tensor]:
                tensors[f"momentum/{name}"] = self.optimizer.state[tensor]["momentum_buffer"]
        best = self.best if math.isfinite(self.best) else None
        progress = {"iteration": self.iteration, "evaluated": self.evaluated, "best": best}
        save_tensors(path, tensors, {"kind": KIND, "settings": settings, **progress})

    def load(self, path, settings: dict, free: set[str]) -> None:
        """Restores what `save` wrote.

        Args:
            settings: of this run; they must equal the saved ones except those named in `free`.

        Raises:
            InputError: a damaged file, or another setting.
        """
        handle, metadata = open_tensors(path, KIND, ("settings", "iteration", "evaluated", "best"), NAMES)
        for key, value in metadata["settings"].items():
            if key not in free and settings.get(key) != value:
                raise InputError(
                    f"{path} was saved with {key}={value}, not {settings.get(key)}; resume it with {value}"
                )
        stored = set(handle.keys())
        with torch.no_grad():
            for name, tensor in self.named.items():
                tensor.copy_(handle.get_tensor(name))
                if f"momentum/{name}" in stored:
                    momentum = torch.empty_like(tensor).copy_(handle.get_tensor(f"momentum/{name}"))
                    self.optimizer.state[tensor]["momentum_buffer"] = momentum
        self.iteration, self.evaluated = metadata["iteration"], metadata["evaluated"]
        self.best = -math.inf if metadata["best"] is None else metadata["best"]
