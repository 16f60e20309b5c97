"""Every pair of a set for the page: before, after, their difference and how far the pair moved."""

import base64
import io
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from PIL import Image

from data.transforms import denormalize
from utils.sets import SynSet

# Bytes of a set's pictures in the page, and what is tried until they fit: longest side and WebP quality.
BUDGET = 11e6
LADDER = ((224, 85), (224, 70), (224, 50), (224, 30), (160, 40), (112, 40), (80, 40), (56, 40))
LOSSLESS_SIDE = 64  # so small that nothing is gained by losing detail
LARGEST = 5  # sentences shown of a text that is made of such
TRIED = 12  # pictures whose size is measured to choose from LADDER


@dataclass
class PairGroup:
    """The pairs of one set.

    Attributes:
        pairs: of each pair its number from 1, data URIs `before`, `after`, `difference`, `captions_before` and
            `captions_after` as (caption, cosine or None), and the distances `picture_moved`, `text_moved`. What needs
            the first state is None without it. Of a text that is made of sentences, `sentences` are the `LARGEST` as
            (sentence, weight) and `terms` their number; else both are None.
        gain: the difference is multiplied by this before it is added to grey.
        side: of the pictures in the page, in pixels.
    """

    pairs: list[dict]
    gain: float | None
    side: int


def pair_group(first: SynSet | None, shown: SynSet, nearest_first=None, nearest_shown=None) -> PairGroup:
    """Lines up a set with its first state, if that is known and of the same shape.

    Args:
        nearest_first, nearest_shown: for each pair a list of (caption, cosine); without, the sets' own captions.
    """
    after = _pixels(shown)
    texts_after = nearest_shown or [[(caption, None)] for caption in shown.captions]
    columns = {"captions_after": texts_after}
    pictures = {"after": after}
    gain = None
    if first is not None:
        before = _pixels(first)
        difference = after - before
        gain = 0.5 / max(difference.abs().flatten()[:: max(1, difference.numel() // 10**6)].quantile(0.99).item(), 1e-3)
        pictures |= {"before": before, "difference": (0.5 + gain * difference).clamp(0, 1)}
        columns["captions_before"] = nearest_first or [[(caption, None)] for caption in first.captions]
        columns["picture_moved"] = difference.square().mean(dim=(1, 2, 3)).sqrt().tolist()
        columns["text_moved"] = (1 - F.cosine_similarity(first.text_syn.float(), shown.text_syn.float())).tolist()
    if shown.sentences:
        made_of = shown.sentences.texts()
        columns |= {"sentences": [terms[:LARGEST] for terms in made_of], "terms": [len(terms) for terms in made_of]}
    side, quality = _choose(pictures)
    columns |= {name: [data_uri(p, side, quality) for p in stack] for name, stack in pictures.items()}
    names = "before", "difference", "captions_before", "picture_moved", "text_moved", "sentences", "terms"
    pairs = [
        {**dict.fromkeys(names), "number": i + 1, **{name: values[i] for name, values in columns.items()}}
        for i in range(len(after))
    ]
    return PairGroup(pairs, gain, min(side, after.shape[-1]))


def _pixels(synset: SynSet) -> torch.Tensor:
    """[M, 3, H, W] in [0, 1]."""
    return denormalize(synset.image_syn.detach().float().cpu(), synset.mean, synset.std)


def _choose(pictures: dict[str, torch.Tensor]) -> tuple[int, int]:
    """The first side and quality of LADDER whose pictures fit into BUDGET, judged by some of them."""
    number = sum(len(stack) for stack in pictures.values())
    some = [picture for stack in pictures.values() for picture in stack[:: -(-len(stack) // TRIED)]]
    for side, quality in LADDER:
        if sum(len(data_uri(picture, side, quality)) for picture in some) / len(some) * number <= BUDGET:
            break
    return side, quality


def data_uri(picture: torch.Tensor, side: int, quality: int = 80) -> str:
    """A WebP picture, at most `side` pixels high and wide, of [3, H, W] in [0, 1]."""
    pixels = (picture * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    image = Image.fromarray(pixels)
    lossless = max(image.size) <= LOSSLESS_SIDE
    image.thumbnail((side, side), Image.Resampling.BICUBIC)
    file = io.BytesIO()
    image.save(file, "WEBP", lossless=lossless, quality=quality, method=0)
    return "data:image/webp;base64," + base64.b64encode(file.getvalue()).decode()
