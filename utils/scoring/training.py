"""Training a model: one epoch over batches of pairs, and a whole model on a set of synthetic pairs."""

import functools
from collections.abc import Callable, Iterable, Iterator

import torch

from data.errors import InputError
from data.transforms import normalize
from networks.clip_model import IMAGE, trained_parameters
from utils.device import copied_to
from utils.sets import phase_rows, rows_on


class NonFiniteLoss(InputError):
    """The training loss became infinite or not a number: `loss`."""

    def __init__(self, loss: float):
        super().__init__(f"training loss became {loss}; lower the learning rates of the model in training")
        self.loss = loss


def make_optimizer(model, lr_img: float, lr_txt: float, momentum: float, weight_decay: float):
    """SGD with a rate for each tower, and what the loss learns with the text tower; what does not train is left out."""
    named, towers = trained_parameters(model).items(), model.towers()
    groups = [
        {"params": [p for name, p in named if (towers[name] == IMAGE) == in_image_tower], "lr": float(lr)}
        for in_image_tower, lr in ((True, lr_img), (False, lr_txt))
    ]
    return torch.optim.SGD([g for g in groups if g["params"]], momentum=momentum, weight_decay=weight_decay)


def device_batches(loader: Iterable, text_embed, encoder, device, augment: Callable | None = None):
    """uint8 pictures and row numbers -> normalised pictures and text embeddings on the device.

    Pictures that come as a frozen encoder's output [B, D_enc] stay as they are.

    Args:
        text_embed: [rows, D_text] on the CPU.
        augment: uint8 [B, 3, S, S] -> uint8 [B, 3, H, W], applied on the device.
    """
    for images, rows in loader:
        images, texts = copied_to(device, images), copied_to(device, text_embed[rows])
        if augment is not None:
            images = augment(images)
        if images.ndim == 4:
            images = normalize(images, encoder.mean, encoder.std)
        yield images, texts


def train_epoch(
    model,
    batches: Iterable,
    optimizer,
    on_batch: Callable | None = None,
) -> tuple[float, float]:
    """One pass over `batches` of (images [B, 3, H, W] normalised, text_embed [B, D_text]).

    Args:
        batches: a third element is the soft targets [B, B].
        on_batch: called with each batch's (image_features, text_features) [B, D], detached, of before the step.

    Returns:
        Mean loss, and the share of images in per cent whose own text is nearest within the batch.

    Raises:
        NonFiniteLoss: the mean loss is not finite.
    """
    # Sums, not lists: a small tensor kept of each step would lie between the gradients and make the memory grow.
    total_loss, correct, seen = 0.0, 0, 0
    for images, text_embed, *targets in batches:
        image_features, text_features = model(images, text_embed)
        loss = model.loss(image_features, text_features, *targets)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        total_loss += loss.detach().double() * len(images)
        image_features, text_features = image_features.detach(), text_features.detach()
        nearest = (image_features @ text_features.T).argmax(dim=1)
        correct += (nearest == torch.arange(len(images), device=nearest.device)).sum()
        seen += len(images)
        if on_batch is not None:
            on_batch(image_features, text_features)
    mean_loss = (total_loss / seen).item()
    if mean_loss != mean_loss or abs(mean_loss) == float("inf"):
        raise NonFiniteLoss(mean_loss)
    return mean_loss, 100 * correct.item() / seen


def train_epochs(
    model,
    batches: Callable[[int], Iterable],
    epochs: int,
    lr_img: float,
    lr_txt: float,
    momentum: float = 0.0,
    weight_decay: float = 0.0,
    decay: bool = False,
    on_batch: Callable | None = None,
) -> Iterator[tuple[int, tuple[float, float]]]:
    """Trains with SGD, epoch after epoch; yields the epoch's number, from 1, and what `train_epoch` returned.

    Args:
        batches: the epoch's number -> its batches, as `train_epoch` takes them.
        lr_img, lr_txt: rates of the two towers.
        decay: both rates × 0.1 after half the epochs.
    """
    optimizer = make_optimizer(model, lr_img, lr_txt, momentum, weight_decay)
    gamma = 0.1 if decay else 1.0
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, step_size=(epochs + 1) // 2, gamma=gamma)
    for epoch in range(1, epochs + 1):
        result = train_epoch(model, batches(epoch), optimizer, on_batch)
        schedule.step()
        yield epoch, result


def train_on_pairs(
    model,
    images,
    text_embed,
    lr_img: float,
    lr_txt: float,
    epochs: int,
    batch_size: int,
    seed: int,
    targets=None,
    phases: int = 1,
    on_epoch: Callable[[int], None] | None = None,
) -> float:
    """Trains `model` on M pairs as the evaluation does; returns the last epoch's mean loss.

    SGD, momentum 0.9, weight decay 5e-4, both rates × 0.1 after half the epochs; so on the pairs of each phase, one
    after the other. The order of pairs, what `images` draws and dropout depend only on `seed`.

    Args:
        images: [M, 3, H, W], normalised, or a frozen encoder's output for them [M, D_enc]; or a function that draws
            those of an epoch by a generator. text_embed: [M, D_text].
        targets: S of `PairLoss` [M, M]; None for hard targets.
        on_epoch: called after each epoch with its number, from 1, counted over all phases.
    """
    order = torch.Generator().manual_seed(seed)

    def batches(rows, epoch):
        indices = rows_on(text_embed.device, rows[torch.randperm(len(rows), generator=order)].split(batch_size))
        seen = images(order) if callable(images) else images
        return ((seen[i], text_embed[i], *(() if targets is None else [targets[i[:, None], i]])) for i in indices)

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        losses = []
        for rows in phase_rows(len(text_embed), phases):
            training = train_epochs(
                model,
                functools.partial(batches, rows),
                epochs=epochs,
                lr_img=lr_img,
                lr_txt=lr_txt,
                momentum=0.9,
                weight_decay=5e-4,
                decay=True,
            )
            for _, (loss, _) in training:
                losses.append(loss)
                if on_epoch is not None:
                    on_epoch(len(losses))
    return losses[-1]
