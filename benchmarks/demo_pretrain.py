"""Makes networks/demo_nfnet.safetensors, the pretrained image encoder of the demo: python -m benchmarks.demo_pretrain

The second one: --image_encoder test_efficientnet --output networks/demo_efficientnet.safetensors

As ImageNet weights are for photographs, it comes from naming single things: the encoder classifies drawn pictures
of one thing by shape, colour, size, background and pattern. It sees no caption and no scene of the demo data.
"""

import argparse
import random
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torchvision.transforms.v2.functional import pil_to_tensor
from tqdm import tqdm

from data.demo.scenes import BACKGROUNDS, COLOURS, PATTERNS, SHAPES, SIZES, draw_scene, paint_scene
from data.transforms import normalize
from networks.image_encoder import build_image_encoder
from utils import cli

CHECKPOINT = Path(__file__).parents[1] / "networks/demo_nfnet.safetensors"
CLASSES = tuple(list(names) for names in (SHAPES, COLOURS, SIZES, BACKGROUNDS, PATTERNS))
BATCH_SIZE, IMAGE_SIZE, SEED = 64, 48, 1


def draw_batch(rng: random.Random) -> tuple[torch.Tensor, torch.Tensor]:
    """Pictures uint8 [B, 3, H, W] of one thing each, and the classes of its five attributes [B, 5]."""
    images, labels = [], []
    for _ in range(BATCH_SIZE):
        scene = draw_scene(rng)
        scene = scene._replace(things=scene.things[:1], relation=rng.choice(["left", "above"]))
        attributes = (*scene.things[0], scene.background, scene.pattern)
        images.append(pil_to_tensor(paint_scene(scene, IMAGE_SIZE, rng)))
        labels.append([names.index(value) for names, value in zip(CLASSES, attributes, strict=True)])
    return torch.stack(images), torch.tensor(labels)


def parse_args(argv=None):
    parser = argparse.ArgumentParser(prog="benchmarks.demo_pretrain", description=__doc__.rpartition("\n\n")[2])
    parser.add_argument("--image_encoder", default="test_nfnet", help="any timm model")
    timm_arguments = {"nargs": "+", "type": cli.key_value, "metavar": "KEY=VALUE", "default": []}
    parser.add_argument("--image_kwargs", **timm_arguments, help="arguments of timm.create_model")
    parser.add_argument("--steps", type=cli.count, default=600, help="batches of 64 pictures")
    parser.add_argument("--output", type=Path, default=CHECKPOINT, help="safetensors file to write")
    return parser.parse_args(argv)


@cli.one_line_errors
def main(argv=None):
    args = parse_args(argv)
    torch.manual_seed(SEED)
    rng = random.Random(f"demo pretraining {SEED}")
    encoder = build_image_encoder(args.image_encoder, IMAGE_SIZE, pretrained=False, kwargs=dict(args.image_kwargs))
    encoder = encoder.train().to(memory_format=torch.channels_last)
    head = torch.nn.Linear(encoder.width, sum(map(len, CLASSES)))
    optimizer = torch.optim.AdamW([*encoder.parameters(), *head.parameters()], lr=2e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=2e-3, total_steps=args.steps)
    for _ in (bar := tqdm(range(args.steps), desc="pretrain")):
        images, labels = draw_batch(rng)
        images = normalize(images, encoder.mean, encoder.std).to(memory_format=torch.channels_last)
        logits = head(encoder(images))
        parts = logits.split([len(names) for names in CLASSES], dim=1)
        loss = sum(F.cross_entropy(part, label) for part, label in zip(parts, labels.T, strict=True))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        right = [(part.argmax(1) == label).float().mean() for part, label in zip(parts, labels.T, strict=True)]
        bar.set_postfix(loss=f"{loss.item():.2f}", right=" ".join(f"{r:.2f}" for r in right))
    state = {name: value.half().contiguous() for name, value in encoder.model.state_dict().items()}
    save_file(state, args.output, {"about": f"{args.image_encoder} of timm, features, by benchmarks.demo_pretrain"})


if __name__ == "__main__":
    sys.exit(main())
