"""A data set of COCO's size and what each script takes of it: seconds and memory of the host.

    python -m benchmarks.coco_size --make FOLDER
    python -m benchmarks.coco_size --measure FOLDER

113,287 pictures of training with 566,747 captions; 5,000 with 25,010 for each of validation and test. Pictures are
noise of 32 px, captions ten or eleven words drawn from the demo's. The encoders are as wide as BERT and nfnet_l0, 768
and 2304, and small: a BERT without layers and timm's test_nfnet, both drawn at random. So the widths, on which memory
depends, are real, and encoding is not what is measured.
"""

import argparse
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


def make(folder: Path, share: float) -> None:
    """Pictures, annotations and encoders; `share` of the pictures and captions of the training split."""
    encoders(folder)
    draw, words = random.Random(0), _words()
    (folder / "annotations").mkdir(exist_ok=True)
    for split, (pictures, captions) in SIZES.items():
        if split == "train":
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


def encoders(folder: Path) -> None:
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


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--make", type=Path)
    parser.add_argument("--share", type=float, default=1.0)
    args = parser.parse_args()
    make(args.make, args.share)
