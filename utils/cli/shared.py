"""Flags that several scripts have."""

import argparse
import os

import torch

from networks.image_encoder import plain_name
from networks.lora import ALSO_TRAIN
from utils.cli.parser import Parser, count, key_value, number, positive, rate
from utils.cli.recipes import RECIPES


def add_data_flags(parser: Parser) -> None:
    data = parser.section("data")
    add = data.add_argument
    add("--dataset", default="flickr", help="flickr, coco, flickr8k, demo, or any NAME for your own")
    add("--image_root", default="./Flickr30k/flickr-image-dataset/flickr30k-images/", help="folder of the pictures")
    add(
        "--ann_root",
        help="folder of the annotation files, or the one file; if not given ./Flickr30k/ann_file/ for flickr and coco, "
        "--image_root for others",
    )
    add("--split_seed", type=number(int, least=0), default=0, help="splits annotations that name no splits, by picture")
    add("--image_size", type=count, default=224, help="side of the square input in pixels")
    data.add_bool("skip_broken", False, "leave unreadable pictures out instead of stopping")
    add("--cache_dir", default="cache", help="folder for cached caption embeddings, picture features and pictures")


class _OneOrMore(argparse.Action):
    """One value as it is, several as a list."""

    def __call__(self, parser, namespace, values, option_string=None):
        setattr(namespace, self.dest, values[0] if len(values) == 1 else values)


def add_network_flags(parser: Parser, several: type = _OneOrMore) -> None:
    """`several`: what becomes of the list of image encoders and of that of their checkpoints."""
    encoders = parser.section("encoders")
    add = encoders.add_argument
    add(
        "--image_encoder",
        nargs="+",
        action=several,
        type=plain_name,
        default="nfnet",
        metavar="NAME",
        help="nfnet, nf_resnet50, nf_regnet, vit, clip, any timm model, timm/NAME too, or torchvision:NAME",
    )
    encoders.add_bool("image_pretrained", True, "start the image encoder from published weights")
    encoders.add_bool("image_trainable", True, "train the image encoder, not the projections alone")
    add(
        "--image_checkpoint",
        nargs="+",
        action=several,
        metavar="FILE",
        help="file with the image encoder's weights (safetensors or torch); one for each of several encoders, 'none' "
        "for published weights",
    )
    add(
        "--image_kwargs",
        nargs="+",
        type=key_value,
        metavar="KEY=VALUE",
        help="arguments of timm.create_model, or of torchvision's function; NAME:KEY=VALUE for one of several encoders",
    )
    add(
        "--text_encoder",
        default="bert",
        metavar="NAME",
        help="bert, distilbert, clip, any Hugging Face id or a local folder",
    )
    encoders.add_bool("text_pretrained", True, "load the text encoder's weights; False draws them from a fixed seed")
    add(
        "--text_pooling",
        choices=("cls", "mean", "last"),
        default="cls",
        help="first token, mean over tokens, or last token, as GPT-2's need it (not for CLIP)",
    )
    encoders.add_bool("only_has_image_projection", False, "add a projection head to the image tower too; it trains")
    add(
        "--temperature",
        type=positive,
        default=0.07,
        help="of the loss of experts and of networks that score sets; not SigLIP",
    )
    add("--lora_rank", type=count, help="train low-rank updates of the image encoder's weights in their place")
    add("--lora_alpha", type=positive, help="updates are scaled by alpha / rank; the rank if not given")
    add("--lora_layers", help="attn (if not given), attn+mlp, all, or a regular expression on layer names")
    add("--lora_train", choices=ALSO_TRAIN, help="what trains beside the low-rank updates; none if not given")


def add_recipe_flag(parser: Parser) -> None:
    words = "; ".join(f"{name}, {recipe['help']}" for name, recipe in RECIPES.items())
    parser.section("recipe").add_argument("--recipe", choices=RECIPES, help=f"a whole set of defaults: {words}")


def add_expert_flags(parser: Parser, for_set: bool = False) -> None:
    """How an expert trains. `for_set`: its rates are saved with a set too, and must be above 0."""
    experts = parser.section("experts")
    add, kind, whose = experts.add_argument, positive if for_set else rate, ", and of the set" if for_set else ""
    whose_epochs = "of the expert that --method forgetting trains" if for_set else "per expert"
    add("--train_epochs", type=count, default=10, help=f"epochs {whose_epochs}")
    add("--lr_teacher_img", type=kind, default=0.1, help=f"learning rate of the image encoder{whose}")
    add("--lr_teacher_txt", type=kind, default=0.1, help=f"learning rate of the text projection{whose}")
    add("--batch_size_train", type=count, default=128, help="pairs per batch")
    add("--mom", type=number(float, least=0, below=1), default=0.0, help="SGD momentum")
    add("--l2", type=rate, default=0.0, help="weight decay")
    experts.add_bool("decay", False, "multiply the learning rates by 0.1 after half the epochs")
    experts.add_bool("no_aug", False, "train without crops, flips and RandAugment")
    processes = min(8, os.cpu_count() or 1)
    parser.section("machine").add_argument(
        "--num_workers", type=number(int, least=0), default=processes, help="processes that read an expert's pictures"
    )


def add_evaluation_flags(parser: Parser) -> None:
    evaluation = parser.section("evaluation")
    add = evaluation.add_argument
    add("--num_eval", type=count, default=5, help="fresh networks per evaluation")
    add("--epoch_eval_train", type=count, default=50, help="epochs a fresh network trains on the set")
    add("--batch_train", type=count, default=64, help="pairs per batch of a fresh network")
    add(
        "--eval_views",
        type=number(int, least=0),
        default=0,
        metavar="K",
        help="in each epoch a fresh network sees a picture as it is or in one of K augmented views of it, drawn anew",
    )
    evaluation.add_bool("eval_full", False, "fresh networks train whole, not by low-rank updates")


def add_run_flags(parser: Parser) -> None:
    add = parser.section("machine").add_argument
    add(
        "--seed",
        type=number(int, least=0, below=2**32),
        default=0,
        help="the same seed gives the same numbers on a CPU",
    )
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda or cuda:N")
    add(
        "--precision",
        choices=("fp32", "tf32", "bf16"),
        default="tf32",
        help="of the networks' products and of all gradients; parameters, the losses' and scores' own products and"
        " what is learned stay fp32; on a CPU tf32 is fp32",
    )
    add("--batch_size_test", type=count, default=128, help="pictures per batch when recall is measured")


def add_log_flags(parser: Parser) -> None:
    output = parser.section("output")
    output.add_argument("--name", help="name of the wandb run")
    output.add_bool("disabled_wandb", False, "log to metrics.jsonl only")


def add_plan_flag(parser: Parser) -> None:
    parser.section("output").add_bool(
        "plan",
        False,
        "print how many pictures and captions there are, how large caches and memory get and how many hours it takes, "
        "by a short trial on random numbers; then end, with nothing written",
    )
