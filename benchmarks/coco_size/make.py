"""Pictures, annotations and encoders of COCO's sizes, none of them COCO's."""

import json
import random
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from transformers import AutoTokenizer, BertConfig, BertModel

from networks.image_encoder import build_image_encoder
from networks.text_encoder import SHORT_NAMES

SIZES = {"train": (113_287, 566_747), "val": (5_000, 25_010), "test": (5_000, 25_010)}  # pictures, captions
SIDE = 32
WIDE = {"num_features": 2304}  # of test_nfnet, as nfnet_l0 has
TEXT_WIDTH = 768  # BERT's


def make(folder: Path, share: float = 1.0) -> None:
    """Writes `pictures` and `annotations`, `share` of those of each split, and both encoders."""
    _make_encoders(folder)
    draw, words = random.Random(0), _words()
    (folder / "annotations").mkdir(exist_ok=True)
    for split, (pictures, captions) in SIZES.items():
        pictures, captions = round(share * pictures), round(share * captions)
        names = [f"{split}2014/COCO_{split}2014_{number:012d}.jpg" for number in range(pictures)]
        _draw_pictures(split, [folder / "pictures" / name for name in names])
        texts = [[] for _ in names]
        for number in range(captions):
            texts[number % pictures].append(" ".join(draw.choices(words, k=draw.choice((10, 11)))))
        rows = [{"image": name, "caption": own} for name, own in zip(names, texts, strict=True)]
        if split == "train":
            rows = [{**row, "caption": text, "image_id": row["image"]} for row in rows for text in row["caption"]]
        (folder / "annotations" / f"coco_karpathy_{split}.json").write_text(json.dumps(rows), encoding="utf-8")


def _make_encoders(folder: Path) -> None:
    """Encoders of the widths of nfnet_l0 and BERT that cost next to nothing."""
    (folder / "wide_bert").mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    encoder = build_image_encoder("test_nfnet", SIDE, pretrained=False, kwargs=WIDE)
    save_file(encoder.state_dict(), folder / "wide_nfnet.safetensors")
    tokenizer = AutoTokenizer.from_pretrained(SHORT_NAMES["demo"])
    tokenizer.save_pretrained(folder / "wide_bert")
    config = BertConfig(vocab_size=len(tokenizer), hidden_size=TEXT_WIDTH, num_hidden_layers=0)
    BertModel(config).save_pretrained(folder / "wide_bert")


def _words() -> list[str]:
    tokens = AutoTokenizer.from_pretrained(SHORT_NAMES["demo"]).get_vocab()
    return sorted(token for token in tokens if token.isalpha())


def _draw_pictures(split: str, paths: list[Path]) -> None:
    def draw(number: int) -> None:
        noise = np.random.default_rng([*split.encode(), number]).integers(0, 256, (8, 8, 3), dtype=np.uint8)
        file = BytesIO()
        Image.fromarray(noise).resize((SIDE, SIDE), Image.Resampling.BICUBIC).save(file, "JPEG")
        paths[number].write_bytes(file.getvalue())

    paths[0].parent.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(draw, range(len(paths))))
