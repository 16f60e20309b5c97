"""Low-rank updates of frozen weights (Hu et al., LoRA, 2022), for distillation as in Wu et al., TMLR 2024, §3.4.

The update is a parametrisation of the weight: whatever the layer computes from its weight, weight standardisation
included, it computes from W + (α/r)·B·A. Merging is therefore exact, and the adapters are ordinary parameters.
"""

import hashlib
import math
import re
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.utils import parametrize

from data.errors import InputError

ALSO_TRAIN = ("none", "norm", "bias", "norm+bias")


@dataclass(frozen=True)
class Lora:
    """How an encoder is adapted.

    Attributes:
        rank: r, at most; a weight whose smaller side is below r gets that rank, which already represents any update.
        alpha: α; updates are scaled by α/r.
        layers: "attn" (linear layers of self-attention), "attn+mlp", "all" (every Linear and Conv2d), or a
            regular expression searched in the layers' names.
        also_train: what trains beside the adapters: "none"; "norm", scales and shifts of normalisation layers and
            gains of normaliser-free ones; "bias", every bias; "norm+bias".
    """

    rank: int
    alpha: float
    layers: str = "attn"
    also_train: str = "none"

    def __str__(self):
        also = "" if self.also_train == "none" else f", and {self.also_train}"
        return f"adapters of rank {self.rank} on {self.layers}{also}"


class LowRankUpdate(nn.Module):
    """W -> W + scale·B·A, where W [out, in/groups, kh, kw] is seen as a matrix [out, in/groups·kh·kw].

    B [out, r] is zero and A [r, in/groups·kh·kw] Gaussian of variance 1/(in/groups·kh·kw) at the start, so the
    layer starts as it was and the first gradient of A is zero.
    """

    def __init__(self, weight: torch.Tensor, rank: int, scale: float):
        super().__init__()
        out, columns = weight.shape[0], weight[0].numel()
        rank = min(rank, out, columns)
        self.scale = scale
        self.A = nn.Parameter(weight.new_empty(rank, columns))
        self.B = nn.Parameter(weight.new_empty(out, rank))
        self.reset()

    @torch.no_grad()
    def reset(self) -> None:
        self.A.copy_(torch.randn(self.A.shape) / math.sqrt(self.A.shape[1]))  # drawn on the CPU on every device
        self.B.zero_()

    def forward(self, weight):
        return weight + self.scale * (self.B @ self.A).view(weight.shape)


def add_lora(encoder: nn.Module, lora: Lora) -> None:
    """Freezes the timm model `encoder.model` and adapts its layers; the adapters (and `also_train`) train.

    Raises:
        InputError: a rank below 1, no layer that matches, or a pattern that is no regular expression.
    """
    if lora.rank < 1:
        raise InputError(f"the rank of a low-rank update must be at least 1, not {lora.rank}; check --lora_rank")
    chosen = find_layers(encoder.model, lora.layers)
    encoder.requires_grad_(False)
    for layer in chosen.values():
        update = LowRankUpdate(layer.weight, lora.rank, lora.alpha / lora.rank)
        parametrize.register_parametrization(layer, "weight", update)
    for parameter in _also_trained(encoder, lora.also_train):
        parameter.requires_grad_(True)


def reset_lora(encoder: nn.Module) -> None:
    """Draws every A anew from torch's random state and sets every B to zero."""
    for module in encoder.modules():
        if isinstance(module, LowRankUpdate):
            module.reset()


def find_layers(model: nn.Module, layers: str) -> dict[str, nn.Module]:
    """The Linear and Conv2d modules of a timm model that `layers` names, see `Lora`. Raises InputError."""
    candidates = {n: m for n, m in model.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))}
    # The squeeze-and-excitation layers of normaliser-free networks are called attn too, but have no heads.
    attention = tuple(f"{n}." for n, m in model.named_modules() if "attn" in n and hasattr(m, "num_heads"))
    if layers == "all":
        chosen = candidates
    elif layers in ("attn", "attn+mlp"):
        mlp = "mlp" if layers == "attn+mlp" else None
        chosen = {n: m for n, m in candidates.items() if n.startswith(attention) or mlp in n.split(".")}
    else:
        try:
            chosen = {n: m for n, m in candidates.items() if re.search(layers, n)}
        except re.error as error:
            raise InputError(f"--lora_layers '{layers}' is not a regular expression ({error})") from error
    if not chosen:
        names = dict.fromkeys(re.sub(r"\b\d+\b", "*", name) for name in candidates)
        raise InputError(
            f"--lora_layers '{layers}' matches no layer of the image encoder; give all, or a regular expression "
            f"that matches some of: {', '.join(names)}"
        )
    return chosen


def _also_trained(encoder, also_train: str):
    kinds = also_train.split("+")
    for module in encoder.modules():
        is_norm = "Norm" in type(module).__name__ and hasattr(module, "weight")
        for name, parameter in module.named_parameters(recurse=False):
            if ("norm" in kinds and (is_norm or name.endswith("gain"))) or ("bias" in kinds and name == "bias"):
                yield parameter


def base_digest(encoder: nn.Module) -> str:
    """Hex SHA-256 of the encoder's state without its adapters; the same before and after `add_lora`."""
    digest = hashlib.sha256()
    state = {name.replace("parametrizations.weight.original", "weight"): v for name, v in encoder.state_dict().items()}
    for name, value in sorted(state.items()):
        if ".parametrizations." not in name:
            digest.update(f"{name} {tuple(value.shape)} {value.dtype} ".encode())
            digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
