"""Trains experts on the real pairs and saves one trajectory per expert.

An expert is an image encoder and a text projection, fine-tuned with a contrastive loss over the embeddings
of a frozen text encoder. Its parameters before training and after each epoch are its trajectory.
"""

import sys
from pathlib import Path

import torch
from tqdm import tqdm

from data.errors import InputError
from data.pairs import pair_loader
from networks.clip_model import trained_parameters
from utils import cli
from utils.log import Log
from utils.retrieval import evaluate_retrieval
from utils.setup import (
    describe_training,
    find_device,
    find_split,
    make_factory,
    make_text_encoder,
    retrieval_pairs,
    training_pairs,
)
from utils.training import device_batches, make_optimizer, train_epoch
from utils.trajectory import Trajectory, buffer_folder, expert_path, save_trajectory

# Experts in one folder come from one training recipe.
RECIPE = (
    *("image_size", "image_pretrained", "image_checkpoint", "image_kwargs", "image_trainable", "text_pooling"),
    *("text_pretrained", "temperature", "seed", "no_aug", "train_epochs", "lr_teacher_img", "lr_teacher_txt"),
    *("mom", "l2", "decay", "batch_size_train", "lora_rank", "lora_alpha", "lora_layers", "lora_train"),
)


def parse_args(argv=None):
    parser = cli.Parser(prog="buffer.py", description=__doc__)
    add = parser.add_argument
    add("--buffer_path", default="./buffers", help="folder that trajectories are written under")
    add("--num_experts", type=cli.count, default=20, help="experts in the buffer; those already there are kept")
    add("--train_epochs", type=cli.count, default=10, help="epochs per expert")
    add("--lr_teacher_img", type=cli.rate, default=0.1, help="learning rate of the image encoder")
    add("--lr_teacher_txt", type=cli.rate, default=0.1, help="learning rate of the text projection")
    add("--batch_size_train", type=cli.count, default=128, help="pairs per batch")
    add("--mom", type=cli.number(float, least=0, below=1), default=0.0, help="SGD momentum")
    add("--l2", type=cli.rate, default=0.0, help="weight decay")
    parser.add_bool("decay", False, "multiply the learning rates by 0.1 after half the epochs")
    parser.add_bool("no_aug", False, "train without crops, flips and RandAugment")
    cli.add_data_flags(parser)
    cli.add_network_flags(parser)
    cli.add_run_flags(parser)
    cli.add_log_flags(parser)
    return parser.parse(argv)


@cli.one_line_errors
def main(argv=None):
    args = parse_args(argv)
    folder = buffer_folder(args.buffer_path, vars(args))
    missing = missing_experts(folder, args)
    if not missing:
        print(f"all {args.num_experts} experts are in {folder}")
        return

    device = find_device(args)
    train_split, val_split = find_split(args, "train"), find_split(args, "val")
    text_encoder = make_text_encoder(args)
    factory = make_factory(args, text_encoder.width)
    pairs, text_embed = training_pairs(args, train_split, text_encoder)
    validation = retrieval_pairs(args, val_split, text_encoder)
    del text_encoder
    print(f"{len(pairs.paths)} pictures, {len(pairs)} pairs; experts {missing[0]} to {missing[-1]} go to {folder}")

    training = describe_training(factory, factory.fresh(args.seed))
    settings = {**vars(args), **training}
    log = Log(folder, settings, args.name, args.disabled_wandb)
    log(training, step=missing[0] * args.train_epochs)
    for n in missing:
        seed = args.seed + n
        torch.manual_seed(seed)
        loader = pair_loader(pairs, args.batch_size_train, seed, args.num_workers)
        model = factory.fresh(seed)
        snapshots, recalls = train_expert(model, loader, text_embed, validation, n, args, device, log)
        save_trajectory(expert_path(folder, n), snapshots, settings, recalls)
        print(f"saved {expert_path(folder, n)}")
    log.finish()


def missing_experts(folder: Path, args) -> list[int]:
    """Numbers of the experts still to train. Raises InputError if those that exist have another recipe."""
    missing = []
    for n in range(args.num_experts):
        path = expert_path(folder, n)
        if not path.exists():
            missing.append(n)
            continue
        stored = Trajectory(path).settings
        for key in RECIPE:
            if stored.get(key) != getattr(args, key):
                raise InputError(
                    f"{path} was trained with {key}={stored.get(key)}, this run has {key}={getattr(args, key)}; "
                    "give the same value or another --buffer_path"
                )
    return missing


def train_expert(model, loader, text_embed, validation, n, args, device, log):
    """Trains one expert; returns its snapshots (CPU copies) and its validation recalls per epoch."""
    optimizer = make_optimizer(model, args.lr_teacher_img, args.lr_teacher_txt, args.mom, args.l2)
    gamma = 0.1 if args.decay else 1.0
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, step_size=(args.train_epochs + 1) // 2, gamma=gamma)
    snapshots, recalls = [snapshot(model)], []
    for epoch in range(args.train_epochs):
        bar = tqdm(loader, desc=f"expert {n} epoch {epoch + 1}/{args.train_epochs}", leave=False, disable=None)
        batches = device_batches(bar, text_embed, model.image_encoder, device)
        loss, accuracy = train_epoch(model, batches, optimizer, args.temperature)
        schedule.step()
        snapshots.append(snapshot(model))
        recall = evaluate_retrieval(model, *validation, args.batch_size_test, device)
        recalls.append(recall)
        log({"train_loss": loss, "train_acc": accuracy, **recall}, step=n * args.train_epochs + epoch)
        print(
            f"expert {n} epoch {epoch + 1}/{args.train_epochs}: loss {loss:.3f}, validation "
            f"TR@1 {recall['txt_r1']:.1f} IR@1 {recall['img_r1']:.1f} mean {recall['r_mean']:.1f}"
        )
    return snapshots, recalls


def snapshot(model) -> dict[str, torch.Tensor]:
    return {name: p.detach().to("cpu", copy=True) for name, p in trained_parameters(model).items()}


if __name__ == "__main__":
    sys.exit(main())
