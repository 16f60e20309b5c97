"""Pictures of sets of pairs: uint8 pixels, the grid of a set, a few pairs before and after."""

import textwrap

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont

from data.errors import InputError
from data.transforms import denormalize, normalize
from utils.sets.synset import SynSet


def pixels_of(synset: SynSet) -> np.ndarray:
    """The pictures as they are shown: uint8 [M, H, W, 3]."""
    return _as_bytes(_pixels(synset))


def share_out_of_range(synset: SynSet) -> float:
    """Of the pixels' values, those that 8 bits cannot hold to half a step, in 0 to 1."""
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (synset.mean, synset.std))
    values = synset.image_syn.detach().float().cpu() * std + mean
    return ((values - values.clamp(0, 1)).abs() > 1 / 510).float().mean().item()


def fit_images(synset: SynSet, image_size: int, mean, std) -> torch.Tensor:
    """The set's pictures for an encoder: resized to [M, 3, image_size, image_size], normalised with its mean, std.

    Of mixtures, the N pictures that they are mixed from.
    """
    images = synset.image_syn.float()
    if synset.mixture:
        images = normalize(synset.mixture.pictures(), synset.mean, synset.std)
    if images.shape[-1] != image_size:
        images = F.interpolate(images, (image_size, image_size), mode="bicubic", antialias=True, align_corners=False)
    if (tuple(mean), tuple(std)) == (tuple(synset.mean), tuple(synset.std)):
        return images
    old_mean, old_std, mean, std = (
        torch.tensor(v).view(3, 1, 1).to(images) for v in (synset.mean, synset.std, mean, std)
    )
    return (images * old_std + old_mean - mean) / std


def picture_grid(synset: SynSet, columns: int = 10, side: int = 160, lines: int = 5) -> Image.Image:
    """The pictures in rows of `columns`, each `side` pixels wide with its caption under it."""
    line_height, margin = side // 11, 4
    cell_width, cell_height = side + margin, side + lines * line_height + margin
    rows = -(-len(synset.captions) // columns)
    columns = min(columns, len(synset.captions))
    grid = Image.new("RGB", (columns * cell_width + margin, rows * cell_height + margin), "white")
    for i, (picture, caption) in enumerate(zip(pixels_of(synset), synset.captions, strict=True)):
        place = margin + i % columns * cell_width, margin + i // columns * cell_height
        _paste_pair(grid, place, picture, caption, side, lines)
    return grid


def before_and_after(first: SynSet, last: SynSet, count: int = 5, side: int = 144, gain: int = 4) -> Image.Image:
    """The first `count` pairs of two sets of one run in columns, each picture `side` pixels wide.

    In three rows: the pairs of `first` with their captions, those of `last`, and how far the pixels went from one to
    the other, `gain` times, on grey.

    Raises:
        InputError: the sets differ in the number of their pairs or the size of their pictures.
    """
    if first.image_syn.shape != last.image_syn.shape:
        shapes = " and ".join(str(tuple(synset.image_syn.shape)) for synset in (first, last))
        raise InputError(f"the sets hold pictures of shapes {shapes}; give two sets of one run")
    lines, line_height, margin = 5, side // 11, 8
    change = 0.5 + gain * (_pixels(last) - _pixels(first))
    rows = (
        ("before", _pixels(first), first.captions),
        (f"after {last.settings.get('iteration', '?')} iterations", _pixels(last), last.captions),
        (f"change of the pixels, {gain} times", change, None),
    )
    count = min(count, len(first.captions))
    cell_width, title_height = side + margin, 2 * line_height
    row_height = title_height + side + lines * line_height + margin
    size = count * cell_width + margin, 3 * row_height - lines * line_height
    page = Image.new("RGB", size, "white")
    for row, (title, pixels, captions) in enumerate(rows):
        y = row * row_height + margin // 2
        ImageDraw.Draw(page).text((margin, y), title, fill="black", font=ImageFont.load_default(size=side // 9))
        for column, picture in enumerate(_as_bytes(pixels[:count])):
            place = margin + column * cell_width, y + title_height
            _paste_pair(page, place, picture, captions[column] if captions else "", side, lines)
    return page


def _pixels(synset: SynSet) -> torch.Tensor:
    return denormalize(synset.image_syn.detach().float().cpu(), synset.mean, synset.std)


def _as_bytes(pixels: torch.Tensor) -> np.ndarray:
    """[M, 3, H, W] in [0, 1], clamped -> uint8 [M, H, W, 3]."""
    return (pixels.clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()


def _paste_pair(page: Image.Image, place: tuple[int, int], picture, caption: str, side: int, lines: int) -> None:
    """Puts a picture uint8 [H, W, 3] on the page, its upper left corner at `place`, and the caption under it."""
    (x, y), font, draw = place, ImageFont.load_default(size=side // 12), ImageDraw.Draw(page)
    whole_multiple = side % picture.shape[1] == 0  # then every pixel is seen as it is
    resampling = Image.Resampling.NEAREST if whole_multiple else Image.Resampling.BICUBIC
    page.paste(Image.fromarray(picture).resize((side, side), resampling), place)
    draw.rectangle((x - 1, y - 1, x + side, y + side), outline="lightgray")  # a white picture ends somewhere
    for n, line in enumerate(textwrap.wrap(caption, width=22, max_lines=lines, placeholder=" …")):
        draw.text((x, y + side + 2 + n * (side // 11)), line, fill="black", font=font)
