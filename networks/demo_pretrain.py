"""Makes networks/demo_nfnet.safetensors, the pretrained image encoder of the demo: python -m networks.demo_pretrain

As ImageNet weights are for photographs, it comes from naming single things: test_nfnet classifies drawn pictures
of one thing by shape, colour, size, background and pattern. It sees no caption and no scene of the demo data.
"""

import random
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torchvision.transforms.v2.functional import pil_to_tensor
from tqdm import tqdm

from data.scenes import BACKGROUNDS, COLOURS, PATTERNS, SHAPES, SIZES, draw_scene, paint_scene
from data.transforms import normalize

CHECKPOINT = Path(__file__).with_name("demo_nfnet.safetensors")
CLASSES = tuple(list(names) for names in (SHAPES, COLOURS, SIZES, BACKGROUNDS, PATTERNS))
STEPS, BATCH_SIZE, IMAGE_SIZE, SEED = 600, 64, 48, 1


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


def main() -> None:
    torch.manual_seed(SEED)
    rng = random.Random(f"demo pretraining {SEED}")
    model = timm.create_model("test_nfnet", num_classes=0).to(memory_format=torch.channels_last)
    head = torch.nn.Linear(model.num_features, sum(map(len, CLASSES)))
    optimizer = torch.optim.AdamW([*model.parameters(), *head.parameters()], lr=2e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=2e-3, total_steps=STEPS)
    mean, std = model.default_cfg["mean"], model.default_cfg["std"]
    for _ in (bar := tqdm(range(STEPS), desc="pretrain")):
        images, labels = draw_batch(rng)
        logits = head(model(normalize(images, mean, std).to(memory_format=torch.channels_last)))
        parts = logits.split([len(names) for names in CLASSES], dim=1)
        loss = sum(F.cross_entropy(part, label) for part, label in zip(parts, labels.T, strict=True))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        right = [(part.argmax(1) == label).float().mean() for part, label in zip(parts, labels.T, strict=True)]
        bar.set_postfix(loss=f"{loss.item():.2f}", right=" ".join(f"{r:.2f}" for r in right))
    state = {name: value.half().contiguous() for name, value in model.state_dict().items()}
    save_file(state, CHECKPOINT, {"about": "test_nfnet of timm, features, by python -m networks.demo_pretrain"})


if __name__ == "__main__":
    main()
