"""Reads a report as a test needs it, and makes up sets."""

import base64
import io
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from utils.sets import SynSet

VOID = {"meta", "link", "img", "input", "br", "hr"}


class Page(HTMLParser):
    """A page's elements as (tag, attributes), its visible text, and its scripts; checks that tags are balanced."""

    def __init__(self, path):
        super().__init__()
        self.elements, self.open, self.texts, self.scripts = [], [], [], []
        self.feed(Path(path).read_text(encoding="utf-8"))
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        target = self.scripts if self.open and self.open[-1] in ("script", "style") else self.texts
        target.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.texts).split())

    def of(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]

    def charts(self):
        return [attributes["aria-label"] for attributes in self.of("svg")]


def picture(uri):
    """Pixels uint8 [3, H, W] of a data URI."""
    head, _, body = uri.partition(",")
    assert head == "data:image/webp;base64"
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(body))).convert("RGB")).transpose(2, 0, 1)


def pixels(synset):
    mean, std = (np.array(v, dtype=np.float64).reshape(3, 1, 1) for v in (synset.mean, synset.std))
    return (synset.image_syn.double().numpy() * std + mean).clip(0, 1)


def made_up(num, size, iteration=0, seed=0, **settings):
    generator = torch.Generator().manual_seed(seed)
    images, texts = torch.randn(num, 3, size, size, generator=generator), torch.randn(num, 8, generator=generator)
    settings = {"method": "distilled" if iteration else "initial", "iteration": iteration, "dataset": "d", **settings}
    return SynSet(images, texts, 0.1, 0.1, [f"caption {i}" for i in range(num)], (0.5,) * 3, (0.25,) * 3, settings)
