"""Flags that several scripts have."""

import os

import torch

from networks.image_encoder import plain_name
from networks.lora import ALSO_TRAIN
from utils.cli.parser import Parser, count, key_value, number, positive
from utils.cli.recipes import RECIPES


def add_data_flags(parser: Parser) -> None:
    add = parser.add_argument
    add("--image_root", default="./Flickr30k/flickr-image-dataset/flickr30k-images/", help="folder of the pictures")
    add("--ann_root", default="./Flickr30k/ann_file/", help="folder of the annotation files, or the one file")
    add("--split_seed", type=number(int, least=0), default=0, help="splits annotations that name no splits, by picture")
    add("--image_size", type=count, default=224, help="side of the square input in pixels")
    parser.add_bool("skip_broken", False, "leave unreadable pictures out instead of stopping")
    add("--cache_dir", default="cache", help="folder for cached caption embeddings, picture features and pictures")
    add("--num_workers", type=number(int, least=0), default=min(8, os.cpu_count() or 1), help="loader processes")
    add("--batch_size_test", type=count, default=128, help="pictures per batch when recall is measured")


def add_network_flags(parser: Parser, several: bool = False) -> None:
    """`several`: a list of image encoders, with a checkpoint for each, instead of one."""
    add, nargs = parser.add_argument, "+" if several else None
    add(
        "--image_encoder",
        nargs=nargs,
        type=plain_name,
        default="nfnet",
        help="nfnet, nf_resnet50, nf_regnet, vit, clip or any timm model, timm/NAME too",
    )
    parser.add_bool("image_pretrained", True, "start the image encoder from published weights")
    parser.add_bool("image_trainable", True, "train the image encoder, not the projections alone")
    each = "; one for each encoder, 'none' for published weights" if several else ""
    add("--image_checkpoint", nargs=nargs, help=f"file with the image encoder's weights (safetensors or torch){each}")
    add("--image_kwargs", nargs="+", type=key_value, metavar="KEY=VALUE", help="arguments of timm.create_model")
    add("--text_encoder", default="bert", help="bert, distilbert, clip, any Hugging Face id or a local folder")
    parser.add_bool("text_pretrained", True, "load the text encoder's weights; False draws them from a fixed seed")
    add(
        "--text_pooling",
        choices=("cls", "mean", "last"),
        default="cls",
        help="first token, mean over tokens, or last token, as GPT-2's need it (not for CLIP)",
    )
    parser.add_bool("only_has_image_projection", False, "add a projection head to the image tower too; it trains")
    add("--temperature", type=positive, default=0.07, help="temperature of the contrastive loss")
    add("--lora_rank", type=count, help="train low-rank updates of the image encoder's weights in their place")
    add("--lora_alpha", type=positive, help="updates are scaled by alpha / rank; the rank if not given")
    add("--lora_layers", help="attn (if not given), attn+mlp, all, or a regular expression on layer names")
    add("--lora_train", choices=ALSO_TRAIN, help="what trains beside the low-rank updates; none if not given")


def add_recipe_flag(parser: Parser) -> None:
    parser.add_argument(
        "--recipe",
        choices=RECIPES,
        help="a whole set of defaults: wu2024, the paper's, unless --dataset demo; adam, Adam outside; heads, frozen "
        "encoders with a projection on each side; lors, repblend, ptmst, of later papers; demo",
    )


def add_evaluation_flags(parser: Parser) -> None:
    add = parser.add_argument
    add("--num_eval", type=count, default=5, help="fresh networks per evaluation")
    add("--epoch_eval_train", type=count, default=50, help="epochs a fresh network trains on the set")
    add("--batch_train", type=count, default=64, help="pairs per batch of a fresh network")
    parser.add_bool("eval_full", False, "fresh networks train whole, not by low-rank updates")


def add_run_flags(parser: Parser) -> None:
    add = parser.add_argument
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


def add_log_flags(parser: Parser) -> None:
    parser.add_argument("--name", help="name of the wandb run")
    parser.add_bool("disabled_wandb", False, "log to metrics.jsonl only")
