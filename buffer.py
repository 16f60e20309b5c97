"""Trains experts on the real pairs and saves one trajectory per expert.

An expert is an image encoder and a text projection, fine-tuned with a contrastive loss over the embeddings
of a frozen text encoder. Its parameters before training and after each epoch are its trajectory; of a long one,
--keep_epochs stores what matching reads.
"""

import functools
import sys
from pathlib import Path

import torch
from tqdm import tqdm

from data.errors import InputError
from networks.clip_model import trained_parameters
from networks.loss import LOSS_TYPES, PairLoss
from utils import cli, ranks
from utils.cli.checks import check_encoders
from utils.device import describe_device
from utils.experts import (
    SNAPSHOT_TYPES,
    ExpertLocks,
    Trajectory,
    buffer_folder,
    clear_stale,
    expert_path,
    save_trajectory,
)
from utils.files import BackgroundSaver
from utils.log import open_log
from utils.scoring import counted, device_batches, embedded_once, evaluate_retrieval, train_epochs
from utils.setup import (
    args_of_encoders,
    describe_training,
    expert_loader,
    expert_training,
    find_device,
    open_data,
    plan_experts,
)

# Experts in one folder are trained in one way: what these settings say.
EXPERT_SETTINGS = (
    *("image_size", "image_pretrained", "image_checkpoint", "image_kwargs", "image_trainable", "text_pooling"),
    *("text_pretrained", "temperature", "seed", "no_aug", "train_epochs", "lr_teacher_img", "lr_teacher_txt"),
    *("loss_type", "cache_images", "mom", "l2", "decay", "batch_size_train", "precision"),
    *("lora_rank", "lora_alpha", "lora_layers", "lora_train", "only_has_image_projection", "aug_views"),
    "split_seed",
)

# Settings that older experts lack, and what they were trained with.
ADDED = {"loss_type": "InfoNCE", "only_has_image_projection": False, "aug_views": 0, "split_seed": 0}


def parse_args(argv=None):
    parser = cli.Parser(prog="buffer.py", description=__doc__)
    cli.add_recipe_flag(parser)
    cli.add_data_flags(parser)
    parser.section("data").add_bool(
        "cache_images",
        False,
        "decode the training pictures once into a file in --cache_dir (3 bytes a pixel); unlike without it, random "
        "crops are of the picture squashed to a square of 8/7 --image_size",
    )
    cli.add_network_flags(parser)
    cli.add_run_flags(parser)
    experts = parser.section("experts").add_argument
    experts("--num_experts", type=cli.count, default=20, help="experts in the buffer; those already there are kept")
    cli.add_expert_flags(parser)
    experts(
        "--loss_type",
        choices=LOSS_TYPES,
        default="InfoNCE",
        help="contrastive loss; SigLIP learns its scale and bias",
    )
    experts(
        "--aug_views",
        type=cli.number(int, least=0),
        default=0,
        help="with a frozen image encoder, train on the features of so many augmented views of each picture, cached; "
        "0 for those of the test transform",
    )
    output = parser.section("output").add_argument
    output("--buffer_path", default="./buffers", help="folder that trajectories are written under")
    output(
        "--keep_epochs",
        type=cli.count,
        help="store only snapshots 0 to N and the last; matching reads "
        "up to --max_start_epoch - 1 + --expert_epochs (2 by default); all if not given",
    )
    output(
        "--snapshot_type",
        choices=SNAPSHOT_TYPES,
        default="fp16",
        help="later snapshots as fp16 differences to the first, or whole in fp32",
    )
    cli.add_log_flags(parser)
    cli.add_plan_flag(parser)
    return parser.parse(argv)


@cli.one_line_errors
def main(argv=None):
    args = parse_args(argv)
    is_plan = vars(args).pop("plan")
    check_encoders(args)
    if is_plan:
        missing = {own.image_encoder: len(missing_experts(folder_of(own), own)) for own in args_of_encoders(args)}
        plan_experts(args, missing, snapshots=len(kept_epochs(args)))
        return
    for own_args in args_of_encoders(args):
        train_experts(own_args)


def train_experts(args) -> None:
    """Trains the experts of one image encoder that are not there yet."""
    # What is there is kept: the same command goes on where it was stopped, and a larger --num_experts adds some.
    # Rank 0 looks, so that all agree on what is missing.
    folder = folder_of(args)
    if ranks.is_first():
        clear_stale(folder)
    missing = ranks.gather(missing_experts(folder, args))[0]
    if not missing:
        print(f"all {args.num_experts} experts are in {folder}")
        return

    # The texts go through their frozen encoder once, here; a frozen image encoder sees each picture once too.
    print(describe_device(find_device(args)))
    data = open_data(args, scored=("val",))
    real, factory = data.real, data.factory
    validation = embedded_once(data.scored["val"], factory, args.batch_size_test, args.cache_dir)
    print(f"{len(real.paths)} pictures, {len(real)} pairs; experts {missing[0]} to {missing[-1]} go to {folder}")
    loader_of, augment = expert_loader(args, real, factory)

    # What trains is counted once and stands in every expert's file and in the log.
    training = describe_training(args.image_encoder, factory, factory.fresh(args.seed))
    settings = {**vars(args), **training}
    log = open_log(folder, settings, args.name, args.disabled_wandb, fresh=len(missing) == args.num_experts)
    log(training, step=missing[0] * args.train_epochs)
    # Published weights are the start of every expert: they are stored once for the folder.
    shares_start = factory.starts_pretrained and factory.lora is None

    def train(n: int, on_epoch) -> dict:
        # Expert n is the same whichever rank trains it, and however many are trained before it.
        seed = args.seed + n
        torch.manual_seed(seed)
        model, loader = factory.fresh(seed, PairLoss(args.loss_type, args.temperature)), loader_of(seed)
        batches = expert_batches(loader, data.real_embed, model.image_encoder, augment, n, args)
        snapshots, recalls = train_expert(model, batches, validation, n, args, on_epoch)
        return {
            "snapshots": list(snapshots.values()),
            "settings": settings,
            "recalls": recalls,
            "epochs": list(snapshots),
            "snapshot_type": args.snapshot_type,
            "shares_start": shares_start,
        }

    for line in train_missing(missing, folder, train, functools.partial(report_epoch, log, args.train_epochs)):
        print(line)
    log.finish()
    print(describe_experts(folder, args.num_experts))


def folder_of(args) -> Path:
    return buffer_folder(args.buffer_path, vars(args))


def train_missing(missing: list[int], folder: Path, train, report) -> list[str]:
    """Trains and saves experts, in rounds of one for each rank; returns lines on those that another launch trains.

    Args:
        train: (number, function to call with (number, epoch, its numbers by name)) -> what `save_trajectory` takes.
        report: takes what `train` tells, on rank 0: in one process at once, of several after the round, in order.
    """
    waiting, found = iter(missing), True
    with ExpertLocks() as locks, BackgroundSaver() as saver:  # an expert is written while the next one trains

        def save(path: Path, trajectory: dict) -> None:
            save_trajectory(path, **trajectory)
            locks.release(path)  # not before: another launch would train it again
            print(f"saved {path}")

        while found:
            told = []

            def on_epoch(n: int, epoch: int, numbers: dict, told=told) -> None:
                saver.check()  # a full disk ends the run now, not after this expert
                if ranks.count() == 1:
                    report(n, epoch, numbers)
                else:
                    told.append((n, epoch, numbers))

            # The next one that no other process trains; a rank without one still takes part in the round.
            n = next((n for n in waiting if locks.take(expert_path(folder, n))), None)
            if n is not None:
                saver.submit(save, expert_path(folder, n), train(n, on_epoch))
            # All ranks learn of the round, and all end when none has found an expert to train.
            trained = ranks.gather((n, told))
            found = any(n is not None for n, _ in trained)
            for _, told_by_one in sorted(trained, key=lambda one: one[1][:1]):
                for n, epoch, numbers in told_by_one:
                    report(n, epoch, numbers)
    ranks.wait()  # until all are saved
    # Only of experts that are still in other hands; some were finished while this launch trained others.
    return [line for path, line in locks.elsewhere.items() if not path.exists()]


def report_epoch(log, epochs: int, n: int, epoch: int, values: dict) -> None:
    """Logs and prints one epoch of expert n."""
    log(values, step=n * epochs + epoch - 1)  # of all experts on one axis, one after the other
    print(
        f"expert {n} epoch {epoch}/{epochs}: loss {values['train_loss']:.3f}, validation "
        f"TR@1 {values['txt_r1']:.1f} IR@1 {values['img_r1']:.1f} mean {values['r_mean']:.1f}"
    )


def kept_epochs(args) -> list[int]:
    """Epochs whose snapshots are stored: 0 to --keep_epochs, and the last. Raises InputError beyond --train_epochs."""
    last = args.train_epochs if args.keep_epochs is None else args.keep_epochs
    if last > args.train_epochs:
        raise InputError(f"--keep_epochs {last} is beyond --train_epochs {args.train_epochs}; lower it or train longer")
    # The last one, wherever matching ends, is what --all_data and the report score.
    return sorted({*range(last + 1), args.train_epochs})


def describe_experts(folder: Path, count: int) -> str:
    """What is in the folder, how good after the last epoch, and where the numbers are."""
    # Others may be in another launch's hands yet.
    paths = [path for path in (expert_path(folder, n) for n in range(count)) if path.exists()]
    if not paths:
        return f"no expert in {folder} yet"
    recalls, count = [Trajectory(path).recalls for path in paths], len(paths)
    # The spread tells an expert that went astray.
    last = sorted(recall[-1]["r_mean"] for recall in recalls)
    span = f"{last[0]:.1f}" if count == 1 else f"{last[0]:.1f} to {last[-1]:.1f}"
    experts, epochs = counted(count, "expert"), counted(len(recalls[0]), "epoch")
    return f"{experts} of {epochs}, validation mean {span}, in {folder}; numbers in {folder / 'metrics.jsonl'}"


def missing_experts(folder: Path, args) -> list[int]:
    """Numbers of the experts still to train.

    Raises:
        InputError: one that exists was trained in another way, or keeps fewer snapshots than this run would.
    """
    kept = kept_epochs(args)
    missing = []
    for n in range(args.num_experts):
        path = expert_path(folder, n)
        if not path.exists():  # a file appears whole or not at all
            missing.append(n)
            continue
        expert = Trajectory(path)
        # A student that matches several experts needs them to be of one kind.
        for key in EXPERT_SETTINGS:
            stored = expert.settings.get(key, ADDED.get(key))
            if stored != getattr(args, key):
                raise InputError(
                    f"{path} was trained with {key}={stored}, this run has {key}={getattr(args, key)}; "
                    "give the same value or another --buffer_path"
                )
        # More snapshots than wanted do no harm.
        lacking = sorted(set(kept) - set(expert.epochs))
        if lacking:
            raise InputError(
                f"{path} does not keep the snapshots {', '.join(map(str, lacking))} that this run would; "
                "give a lower --keep_epochs, or remove the file to train that expert again"
            )
    return missing


def expert_batches(loader, real_embed, encoder, augment, n: int, args):
    """A function from the epoch to its batches on the device, as `train_epochs` takes it, behind a bar for expert n."""
    device = find_device(args)

    # Each pass over the loader has another order and other augmentations, by its seed and the epoch.
    def batches(epoch: int):
        title = f"expert {n} epoch {epoch}/{args.train_epochs}"
        bar = tqdm(loader, desc=title, leave=False, disable=None, position=ranks.rank())
        return device_batches(bar, real_embed, encoder, device, augment)

    return batches


def train_expert(model, batches, validation, n: int, args, on_epoch):
    """Trains one expert; returns its snapshots (CPU copies) by epoch and its validation recalls after each.

    `on_epoch` is called with the expert's number, the epoch and its numbers. Raises InputError if the loss is not
    finite.
    """
    device, kept = find_device(args), set(kept_epochs(args))
    snapshots, recalls = {0: snapshot(model)}, []  # θ*_0: a student may start where the expert did
    for epoch, (loss, accuracy) in train_epochs(model, batches, **expert_training(args)):
        if epoch in kept:
            snapshots[epoch] = snapshot(model)
        # How good an expert is, is logged; the trajectory is kept whatever it says.
        recall = evaluate_retrieval(model, *validation, args.batch_size_test, device)
        recalls.append(recall)
        # Told at once in one process; of several, the first tells all after the round.
        on_epoch(n, epoch, {"train_loss": loss, "train_acc": accuracy, **recall})
    return snapshots, recalls


def snapshot(model) -> dict[str, torch.Tensor]:
    """What trains, on the CPU: a copy, as the next epoch changes it."""
    return {name: p.detach().to("cpu", copy=True) for name, p in trained_parameters(model).items()}


if __name__ == "__main__":
    sys.exit(main())
