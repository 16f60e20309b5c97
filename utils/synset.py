"""A set of synthetic (or chosen real) pairs on disk, and its picture grid."""

import textwrap
from dataclasses import dataclass, field
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont

from data.transforms import denormalize
from utils.files import open_tensors, save_tensors

KIND = "set of pairs"
TENSORS = ("image_syn", "text_syn", "syn_lr_img", "syn_lr_txt")


@dataclass
class SynSet:
    """M pairs that a fresh model can be trained on.

    Attributes:
        image_syn: [M, 3, H, W], pixels normalised with mean and std.
        text_syn: [M, D_text], embeddings of the frozen text encoder in `settings`.
        syn_lr_img, syn_lr_txt: the rates to train the image and the text tower with.
        captions: the nearest real caption of each row of text_syn; of a coreset, the pair's own.
        mean, std: normalisation of image_syn, three floats each.
        settings: of the run that made it: method, dataset, encoders, seed and the rest of its command line.
        files, scores: of a coreset, the picture's name in the annotations and the method's score of each pair.
    """

    image_syn: torch.Tensor
    text_syn: torch.Tensor
    syn_lr_img: float
    syn_lr_txt: float
    captions: list[str]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    settings: dict = field(default_factory=dict)
    files: list[str] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)


def save_synset(path: str | Path, synset: SynSet) -> None:
    """Writes the set to one safetensors file; see `SynSet` for its contents.

    Raises:
        InputError: the file cannot be written; the previous one remains.
    """
    tensors = {
        "image_syn": synset.image_syn,
        "text_syn": synset.text_syn,
        "syn_lr_img": torch.tensor(synset.syn_lr_img),
        "syn_lr_txt": torch.tensor(synset.syn_lr_txt),
    }
    named = {key: getattr(synset, key) for key in ("captions", "mean", "std", "settings", "files", "scores")}
    save_tensors(path, tensors, {"kind": KIND, **named})


def load_synset(path: str | Path) -> SynSet:
    """Reads a set.

    Raises:
        InputError: the file is missing, damaged, not a set of pairs, or lacks a part of one.
    """
    handle, metadata = open_tensors(path, KIND, ("captions", "mean", "std", "settings"), TENSORS)
    return SynSet(
        image_syn=handle.get_tensor("image_syn"),
        text_syn=handle.get_tensor("text_syn"),
        syn_lr_img=handle.get_tensor("syn_lr_img").item(),
        syn_lr_txt=handle.get_tensor("syn_lr_txt").item(),
        captions=metadata["captions"],
        mean=tuple(metadata["mean"]),
        std=tuple(metadata["std"]),
        settings=metadata["settings"],
        files=metadata.get("files", []),
        scores=metadata.get("scores", []),
    )


def picture_grid(synset: SynSet, columns: int = 10, side: int = 160, lines: int = 4) -> Image.Image:
    """The pictures in rows of `columns`, each `side` pixels wide with its caption under it."""
    font = ImageFont.load_default(size=side // 12)
    line_height, margin = side // 11, 4
    cell_width, cell_height = side + margin, side + lines * line_height + margin
    rows = -(-len(synset.captions) // columns)
    columns = min(columns, len(synset.captions))
    grid = Image.new("RGB", (columns * cell_width + margin, rows * cell_height + margin), "white")
    draw = ImageDraw.Draw(grid)
    pixels = denormalize(synset.image_syn.detach().float().cpu(), synset.mean, synset.std)
    pixels = (pixels * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    for i, (picture, caption) in enumerate(zip(pixels, synset.captions, strict=True)):
        x, y = margin + i % columns * cell_width, margin + i // columns * cell_height
        grid.paste(Image.fromarray(picture).resize((side, side), Image.Resampling.BICUBIC), (x, y))
        for n, line in enumerate(textwrap.wrap(caption, width=24, max_lines=lines, placeholder=" …")):
            draw.text((x, y + side + n * line_height), line, fill="black", font=font)
    return grid
