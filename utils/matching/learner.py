"""The pairs under distillation: their optimizer, how far they are, and the state a run resumes from."""

import functools
import math

import torch
from torch import Tensor

from data.errors import InputError
from utils.files import open_tensors, save_tensors
from utils.matching.guard import Guard
from utils.sets import Pairs
from utils.sets.pairs import NAMES

KIND = "distillation state"
RATES = NAMES[2:]
OLD_NAMES = {"momentum_buffer": "momentum"}  # of optimizer states in the file
OPTIMIZERS = {
    "sgd": functools.partial(torch.optim.SGD, lr=0.0, momentum=0.5),
    "adam": functools.partial(torch.optim.Adam, betas=(0.9, 0.99)),
}
RELATIVE = {"adam"}  # those whose rates are in units of the data, see `PairLearner`


class PairLearner:
    """Moves the pairs, by one of `OPTIMIZERS`.

    "sgd", as published: momentum 0.5, on the values themselves; no step more than doubles or halves a
    learned rate, so that it stays positive.
    "adam" (β₁ 0.9, β₂ 0.99): lr_img and lr_txt are in standard deviations of the first pixels and of the first text
    embeddings, lr_sim and lr_img of weights of mixtures in their own units, and the learned rates move on a
    logarithmic scale, so that the same numbers fit other data and encoders.

    Args:
        pairs: the first pairs; moved in place.
        lr_img, lr_txt, lr_lr, lr_sim: learning rates of the pixels, the text embeddings, the learned rates and the soft
            targets; 0 keeps them.
        spread: of the first pictures, which lr_img of "adam" is relative to, see `PictureForm.spread`; the standard
            deviation of image_syn if not given.
        ema_decay: of the average of the pairs over the steps, `averaged`; 0 for the pairs themselves.

    Attributes:
        pairs: the current `Pairs`.
        averaged: the mean of the pairs after steps s = 1 … t of this phase with weights d^(t − s): an exponential
            average with Adam's correction for a short past (PTM-ST's keeps a share d^t of the first pairs); with d = 0
            the current ones.
        guard: what limits a gradient far outside what the run has seen, see `Guard`.
        iteration: steps taken.
        phase_start: steps taken before this phase.
        evaluated: iteration of the last evaluation, -1 before the first.
        best: best validation recall so far.

    Raises:
        ValueError: there is no such optimizer.
    """

    def __init__(
        self,
        pairs: Pairs,
        lr_img: float,
        lr_txt: float,
        lr_lr: float,
        optimizer: str = "sgd",
        lr_sim: float = 0.0,
        ema_decay: float = 0.0,
        spread: float | None = None,
    ):
        if optimizer not in OPTIMIZERS:
            raise ValueError(f"unknown optimizer {optimizer}; there are {', '.join(OPTIMIZERS)}")
        self.pairs, self.ema_decay = pairs, ema_decay
        self.averaged = Pairs.of(tensor.detach().clone() for tensor in pairs.tensors()) if ema_decay else pairs
        self.in_logs, self.lr_lr = optimizer in RELATIVE, lr_lr
        self.guard = Guard()
        self.iteration, self.phase_start, self.evaluated, self.best = 0, 0, -1, -math.inf
        self.named = {name: tensor.requires_grad_() for name, tensor in pairs.named().items()}
        # What the optimizer sees, in the order of the pairs.
        self.moved = {
            f"log_{name}" if self._in_log(name) else name: tensor.detach().log() if self._in_log(name) else tensor
            for name, tensor in self.named.items()
        }
        if self.in_logs:
            spread = pairs.image_syn.std().item() if spread is None else spread
            lr_img, lr_txt = lr_img * spread, lr_txt * pairs.text_syn.std().item()
        by_name = dict(zip(NAMES, (lr_img, lr_txt, lr_lr, lr_lr), strict=True))
        groups = [
            {"params": [variable], "lr": by_name.get(name, lr_sim)}
            for name, variable in zip(self.named, self.moved.values(), strict=True)
        ]
        self.optimizer = OPTIMIZERS[optimizer](groups)

    @torch.no_grad()
    def step(self, gradient: Pairs) -> None:
        """One step against `gradient`, whose parts for the rates are ∂L/∂β."""
        for variable, (name, value), grad in zip(
            self.moved.values(), self.named.items(), gradient.tensors(), strict=True
        ):
            variable.grad = grad * value if self._in_log(name) else grad  # ∂L/∂log β = β ∂L/∂β
        before = {name: self.named[name].clone() for name in RATES}
        self.optimizer.step()
        for name in RATES:
            if self.in_logs:
                self.named[name].copy_(self.moved[f"log_{name}"].exp())
            else:
                self._limit_rate(name, before[name])
            if before[name].ndim:
                self._keep_idle(name, before[name], getattr(gradient, name) == 0)
        self.iteration += 1
        if self.ema_decay:
            newest = (1 - self.ema_decay) / (1 - self.ema_decay ** (self.iteration - self.phase_start))
            for average, value in zip(self.averaged.tensors(), self.pairs.tensors(), strict=True):
                average.lerp_(value, newest)

    @torch.no_grad()
    def begin_phase(self) -> None:
        """Goes on from the average with a new one and a new optimizer: a phase of PTM-ST is a run of its own."""
        for name, average in self.averaged.named().items():
            self.named[name].copy_(average)
            if self._in_log(name):
                self.moved[f"log_{name}"].copy_(average.log())
        self.optimizer.state.clear()
        self.phase_start = self.iteration

    def _in_log(self, name: str) -> bool:
        return self.in_logs and name in RATES

    def _keep_idle(self, name: str, before: Tensor, idle: Tensor) -> None:
        """Undoes what momentum did to the rates of encoders that took no part in the iteration."""
        self.named[name].copy_(torch.where(idle, before, self.named[name]))
        if self.in_logs:
            log = self.moved[f"log_{name}"]
            log.copy_(torch.where(idle, before.log(), log))

    def _limit_rate(self, name: str, before: Tensor) -> None:
        rate = self.named[name]
        if self.guard.limit_rate(before, rate):  # then the momentum is that of the step that was taken
            self.optimizer.state[rate]["momentum_buffer"] = (before - rate) / self.lr_lr

    def is_finite(self) -> bool:
        return all(torch.isfinite(tensor).all() for tensor in self.named.values())

    def save(self, path, settings: dict) -> None:
        """Writes pairs, their average, optimizer and progress. Raises InputError if the file cannot be written."""
        best = self.best if math.isfinite(self.best) else None
        progress = {"iteration": self.iteration, "phase_start": self.phase_start, "evaluated": self.evaluated}
        progress |= {"best": best, "guard": self.guard.state()}
        average = (
            {f"average/{name}": tensor for name, tensor in self.averaged.named().items()} if self.ema_decay else {}
        )
        tensors = {**self.named, **self.moved, **average, **self._optimizer_state()}
        save_tensors(path, tensors, {"kind": KIND, "settings": settings, **progress})

    def _optimizer_state(self) -> dict[str, Tensor]:
        return {
            f"{OLD_NAMES.get(key, key)}/{name}": value
            for name, variable in self.moved.items()
            for key, value in self.optimizer.state[variable].items()
            if value is not None
        }

    @torch.no_grad()
    def _restore(self, stored: dict[str, Tensor]) -> None:
        """The average and the optimizer's state, whose names have a "/"."""
        new_names = {old: new for new, old in OLD_NAMES.items()}
        for key, value in stored.items():
            part, _, name = key.partition("/")
            if part == "average":
                self.averaged.named()[name].copy_(value)
                continue
            variable = self.moved[name]
            if part != "step":  # Adam's count of steps stays on the CPU
                value = torch.empty_like(variable).copy_(value)
            self.optimizer.state[variable][new_names.get(part, part)] = value

    def _misfit(self, metadata: dict) -> str | None:
        """What keeps a state's metadata from being progress of such a learner."""
        guard, known = metadata.get("guard", {}), self.guard.state()
        if not isinstance(metadata["settings"], dict):
            return "has settings that are no table of names and values"
        for key in ("iteration", "phase_start"):
            value = metadata.get(key, 0)
            if not isinstance(value, int) or value < 0:
                return f"has the {key} {value} instead of a number of iterations"
        if not isinstance(metadata["best"], int | float | None):
            return f"has the best recall {metadata['best']} instead of a number"
        if not (isinstance(guard, dict) and all(isinstance(guard[key], type(known.get(key))) for key in guard)):
            return "has a guard of another form"
        return None

    def load(self, path, settings: dict, free: set[str], added: dict | None = None) -> None:
        """Restores what `save` wrote.

        Args:
            settings: of this run; they must equal the saved ones except those named in `free`.
            added: what a state was made with that does not say so.

        Raises:
            InputError: a damaged file, or another setting.
        """
        handle, metadata = open_tensors(path, KIND, ("settings", "iteration", "evaluated", "best"), NAMES)
        if problem := self._misfit(metadata):
            raise InputError(f"{path} {problem}; start the run anew in another folder")
        for key, value in {**(added or {}), **metadata["settings"]}.items():
            if key not in free and settings.get(key) != value:
                raise InputError(
                    f"{path} was saved with {key}={value}, not {settings.get(key)}; resume it with {value}"
                )
        stored = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118, a handle is no dict
        with torch.no_grad():
            for name, tensor in {**self.named, **self.moved}.items():
                if stored[name].shape != tensor.shape:
                    shapes = " and ".join(str(tuple(part.shape)) for part in (stored[name], tensor))
                    raise InputError(f"{path} holds another {name} than this run learns ({shapes}); start it anew")
                tensor.copy_(stored[name])
        for name, value in stored.items():
            part, _, variable = name.rpartition("/")
            wanted = self.averaged.named() if part == "average" else {**self.named, **self.moved}
            if variable not in wanted or value.numel() not in (1, wanted[variable].numel()):
                raise InputError(f"{path} has {name}, which is of nothing that this run learns; start it anew")
            if not value.isfinite().all():
                raise InputError(f"{path} has values in {name} that are not finite; start it anew")
        self._restore({name: value for name, value in stored.items() if "/" in name})
        self.iteration, self.evaluated = metadata["iteration"], metadata["evaluated"]
        self.phase_start = metadata.get("phase_start", 0)
        self.best = -math.inf if metadata["best"] is None else metadata["best"]
        self.guard.restore(metadata.get("guard", {}))
