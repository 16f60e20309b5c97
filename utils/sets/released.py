"""Sets of pairs in the form of LoRS, RepBlend and PTM-ST: a torch file of tensors that does not say how it was made.

A dict of `image` [M, 3, H, W], `text` [M, D_text], `syn_lr_img`, `syn_lr_txt` and, of soft targets,
`similarity_params` (lowrank: w [M], L [M, r], R [M, r]; full: S) and `similarity_mat`, S [M, M] itself, which is
diag(w) + (α / r) L Rᵀ with an α that the file does not hold.
"""

import pickle
import re
import warnings
from pathlib import Path

import torch
from torch import Tensor

from data.errors import InputError
from utils.sets.misfit import tensor_problem
from utils.sets.similarity import similarity_matrix, similarity_misfit, similarity_names

METHOD = "distilled elsewhere"
MEAN = (0.48145466, 0.4578275, 0.40821073)  # CLIP's, which these programs take for every encoder
STD = (0.26862954, 0.26130258, 0.27577711)
LOSS_TYPE = "WBCE"  # of their published runs
NAMES = {"image": "image_syn", "text": "text_syn", "syn_lr_img": "syn_lr_img", "syn_lr_txt": "syn_lr_txt"}  # of ours


def is_released(path: str | Path) -> bool:
    return Path(path).suffix in (".pt", ".pth") and not Path(path).is_dir()


def read_released(path: str | Path) -> tuple[dict[str, Tensor], dict]:
    """Tensors and metadata of such a file by the names of our own sets, not yet checked; captions are empty texts.

    Raises:
        InputError: the file is missing, damaged, holds code, or lacks a tensor.
    """
    stored = _load(path)
    lacking = [key for key in NAMES if not isinstance(stored.get(key), Tensor)]
    if lacking:
        raise InputError(f"set of pairs {path} lacks the tensor {', '.join(lacking)}; docs/files.md has its form")
    for key in ("image", "text"):
        if problem := tensor_problem(stored[key]):
            raise InputError(f"set of pairs {path}: its tensor {key} {problem}; give another file")
    tensors = {ours: stored[theirs].detach() for theirs, ours in NAMES.items()}
    num_pairs = len(tensors["image_syn"]) if tensors["image_syn"].ndim else 0
    similarity, alpha = _read_similarity(path, stored, num_pairs)
    tensors |= dict(zip(similarity_names(similarity), similarity, strict=True))
    metadata = {"captions": [""] * num_pairs, "mean": list(MEAN), "std": list(STD), "settings": {"method": METHOD}}
    return tensors, {**metadata, "alpha": alpha, "loss_type": LOSS_TYPE if similarity else "InfoNCE"}


def _load(path: str | Path) -> dict:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a pickle's version; one line says what is wrong
            stored = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise InputError(f"set of pairs {path} does not exist") from error
    except pickle.UnpicklingError as error:
        named = re.search(r"GLOBAL ([\w.]+)", str(error))
        problem = (
            f"holds code or objects ({named[1]}), which are not loaded" if named else "is damaged or no torch file"
        )
        raise InputError(f"set of pairs {path} {problem}; it must be a dict of tensors") from error
    except Exception as error:  # damaged files fail in many ways
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(f"set of pairs {path} is damaged or no torch file ({reason}); give another file") from error
    if not isinstance(stored, dict):
        raise InputError(f"set of pairs {path} holds a {type(stored).__name__}; it must be a dict of tensors")
    return stored


def _read_similarity(path, stored: dict, num_pairs: int) -> tuple[tuple[Tensor, ...], float]:
    """The parts of S and their α.

    S is what those programs train with: where the parts do not give it, it stands for itself. The identity, which is
    hard targets, has no parts.
    """
    matrix, parts = stored.get("similarity_mat"), stored.get("similarity_params", ())
    parts = tuple(parts) if isinstance(parts, list | tuple) else (parts,)
    matrix = parts[0] if matrix is None and len(parts) == 1 else matrix
    if matrix is None and not parts:
        return (), 1.0
    if not all(isinstance(part, Tensor) for part in (*parts, matrix)) or len(parts) not in (0, 1, 3):
        raise InputError(
            f"set of pairs {path} has a similarity that is not similarity_mat [M, M] beside similarity_params, one "
            "or three tensors; docs/files.md has its form"
        )
    matrix, *parts = (part.detach() for part in (matrix, *parts))
    if len(parts) == 3 and not similarity_misfit((matrix,), num_pairs):
        if similarity_misfit(parts, num_pairs):
            return tuple(parts), 1.0  # for `load_synset` to say
        alpha = find_alpha(parts, matrix)
        if alpha is not None:
            return tuple(parts), alpha
    is_identity = torch.equal(matrix, torch.eye(num_pairs))
    return () if is_identity else (matrix,), 1.0


def find_alpha(parts: list[Tensor], matrix: Tensor) -> float | None:
    """The α, to six digits, with which the parts of a lowrank S give `matrix`; None if none does."""
    parts, matrix = [part.double() for part in parts], matrix.double()
    product = similarity_matrix((torch.zeros_like(parts[0]), *parts[1:]), 1.0)  # L Rᵀ / r
    rest = matrix - torch.diag(parts[0])
    squares = product.square().sum()
    alpha = float(f"{(rest * product).sum() / squares:.6g}") if squares > 0 else 1.0  # any will do
    fits = torch.allclose(alpha * product, rest, rtol=0, atol=1e-5 * max(1.0, matrix.abs().max().item()))
    return alpha if fits else None
