"""What a run computes on, fresh models, and how they train."""

import torch

from data.errors import InputError
from networks.clip_model import CLIPModel, ModelFactory, count_parameters
from networks.image_encoder import build_image_encoder
from networks.lora import Lora
from utils import ranks
from utils.scoring import Evaluation


def find_device(args) -> torch.device:
    """The device of --device. Raises InputError if it is not there."""
    try:
        device = ranks.device(args.device)
        torch.zeros(1, device=device).item()  # the meta device has no numbers
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"--device {args.device} cannot be used ({str(error).splitlines()[0]})") from error
    return device


def make_factory(args, text_dim: int, train_in_full: bool = False) -> ModelFactory:
    """Gives fresh models with the encoders of the command line; `train_in_full` leaves adapters out."""

    def build():
        return build_image_encoder(
            args.image_encoder, args.image_size, args.image_pretrained, args.image_checkpoint, args.image_kwargs
        )

    device = find_device(args)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = args.precision == "tf32"
    return ModelFactory(
        build,
        starts_pretrained=args.image_pretrained or args.image_checkpoint is not None,
        text_dim=text_dim,
        image_trainable=args.image_trainable,
        device=device,
        lora=None if train_in_full else lora_of(args),
        bf16=args.precision == "bf16",
        image_projection=args.only_has_image_projection,
    )


def lora_of(args) -> Lora | None:
    return None if args.lora_rank is None else Lora(args.lora_rank, args.lora_alpha, args.lora_layers, args.lora_train)


def expert_training(args) -> dict:
    """How an expert is trained: the keyword arguments of `train_epochs`."""
    return {
        "epochs": args.train_epochs,
        "lr_img": args.lr_teacher_img,
        "lr_txt": args.lr_teacher_txt,
        "momentum": args.mom,
        "weight_decay": args.l2,
        "decay": args.decay,
    }


def make_evaluation(args, looks: int = 0) -> Evaluation:
    """How a fresh network is trained on a set and looked at."""
    return Evaluation(
        num_eval=args.num_eval,
        epochs=args.epoch_eval_train,
        batch_size=args.batch_train,
        batch_size_test=args.batch_size_test,
        image_size=args.image_size,
        temperature=args.temperature,
        views=args.eval_views,
        looks=looks,
    )


def describe_training(name: str, factory: ModelFactory, model: CLIPModel) -> dict:
    """Prints once what trains with the image encoder `name`; returns what is saved of it as settings.

    These are the counts and the digest of the frozen weights.
    """
    counts = count_parameters(model)
    line = f"{name}: training {factory.trains}: {counts['parameters_trained']:,} parameters"
    if counts["parameters_trained"] < counts["parameters_full"]:
        line += (
            f" of {counts['parameters_full']:,} ({counts['reduction_percent']:.2f} % fewer), in the image tower "
            f"{counts['image_parameters_trained']:,} of {counts['image_parameters_full']:,} "
            f"({counts['image_reduction_percent']:.2f} % fewer)"
        )
    print(line)
    return {**counts, "lora_base": factory.base}
