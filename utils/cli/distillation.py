"""Flags of distill.py alone."""

import argparse

from networks.loss import LOSS_TYPES
from utils.cli.parser import Parser, count, number, positive, positive_or_fit, rate
from utils.cli.recipes import RELEASED_STUDENT
from utils.forms import OPERATIONS, USUAL
from utils.matching import OPTIMIZERS
from utils.sets import BATCH_ORDERS, SIM_TYPES

SEGMENTS_HELP = (
    "pieces of trajectories that an iteration matches, of which it takes the mean gradient; with a frozen image "
    "encoder the pictures go through it once for all of them"
)
FIRST_RATE_HELP = "first value of the %s tower's learned rate; fit for the largest with which students do not go astray"
EMA_HELP = "what is scored and saved is an average over iterations with this decay; 0 for the pairs as they are"


class _Operations(argparse.Action):
    """Operations in their usual order, the usual ones if none is named."""

    def __call__(self, parser, namespace, values, option_string=None):
        setattr(namespace, self.dest, [name for name in OPERATIONS if name in (values or USUAL)])


def add_distillation_flags(parser: Parser) -> None:
    _add_pair_flags(parser)
    _add_trajectory_flags(parser)
    _add_student_flags(parser)
    _add_outer_flags(parser)
    _add_output_flags(parser)
    parser.section("evaluation").add_argument(
        "--eval_it", type=count, default=50, help="evaluate and save every so many iterations"
    )
    parser.section("machine").add_argument(
        "--pair_chunk", type=count, help="pairs per student step in memory at a time; what fits if not given"
    )


def _add_pair_flags(parser: Parser) -> None:
    """What is learned, and what it starts from."""
    pairs = parser.section("pairs")
    add = pairs.add_argument
    add("--num_queries", type=count, default=100, help="number of synthetic pairs")
    add(
        "--pix_init",
        choices=("real", "kmeans", "noise"),
        default="real",
        help="pixels start from random real pictures, from those of the pairs nearest to k-means centres (texts too), "
        "or from noise",
    )
    add("--txt_init", choices=("real", "noise"), default="real", help="texts start from the pairs' captions or noise")
    add(
        "--init_set", metavar="FILE", help="start from the pictures and texts of this set, a file or an exported folder"
    )
    add(
        "--pix_param",
        choices=("pixels", "pyramid", "mixture"),
        default="pixels",
        help="what is learned of the pictures: their pixels, levels of growing resolution that add up to them, or "
        "weights with which real pictures are mixed after a frozen image encoder, so that any encoder can take them",
    )
    add(
        "--pix_limit",
        type=positive,
        metavar="R",
        help="how far a pixel, from 0 to 1, may go from where it starts; as far as it goes if not given",
    )
    add("--pix_words", type=count, default=1000, help="real pictures that mixtures are made of, stored with the set")
    add("--pix_quality", type=number(int, least=1, most=95), default=90, help="of their JPEG files, 1 to 95")
    add(
        "--txt_param",
        choices=("embeddings", "mixture"),
        default="embeddings",
        help="what is saved of the texts: any embeddings, or sums of few sentences with weights, so that any text "
        "encoder can take them",
    )
    add("--txt_terms", type=count, default=16, help="sentences that a text of a mixture has at most")
    add(
        "--txt_words",
        metavar="FILE",
        help="sentences or words that mixtures are made of, one a line or a .json list, instead of training captions",
    )
    pairs.add_bool("image_only", False, "learn the pictures (and rates), keep the real texts: an ablation")
    pairs.add_bool("text_only", False, "learn the texts (and rates), keep the real pictures: an ablation")
    add("--sim_type", choices=SIM_TYPES, default="none", help="learn how alike pairs are: the targets of the loss")
    add("--sim_rank", type=count, default=10, help="rank of a lowrank similarity")
    add("--alpha", type=positive, default=3.0, help="a lowrank similarity's product is scaled by alpha / sim_rank")
    add(
        "--phases",
        type=count,
        default=1,
        help="learn the pairs in so many parts, one after the other, each with starts an epoch later than the last; "
        "what trains on the set sees the parts in this order",
    )


def _add_trajectory_flags(parser: Parser) -> None:
    """Which pieces of which trajectories are matched."""
    add = parser.section("experts").add_argument
    add("--buffer_path", default="./buffers", help="folder given to buffer.py, or the one the experts lie in")
    add("--expert_epochs", type=count, default=1, help="epochs from the student's start to the expert's target")
    add("--max_start_epoch", type=count, default=2, help="students start at an epoch below this")
    add(
        "--shortcut",
        type=count,
        metavar="K",
        help="match straightened trajectories from an expert's start to epoch K",
    )
    add("--max_files", type=count, help="read at most so many expert files")
    add("--max_experts", type=count, help="read at most so many experts of a file (released layout)")


def _add_student_flags(parser: Parser) -> None:
    student = parser.section("student")
    add = student.add_argument
    add("--syn_steps", type=count, default=8, help="student steps per iteration")
    add("--mini_batch_size", type=count, default=100, help="pairs per student step, at most num_queries")
    add(
        "--batch_order",
        choices=BATCH_ORDERS,
        default="independent",
        help="each step draws pairs anew, or walks on through a random order of all",
    )
    add("--lr_teacher_img", type=positive_or_fit, default=0.1, help=FIRST_RATE_HELP % "image")
    add("--lr_teacher_txt", type=positive_or_fit, default=0.1, help=FIRST_RATE_HELP % "text")
    add(
        "--student_momentum",
        type=number(float, least=0, below=1),
        default=0.0,
        help="momentum of the student's steps; evaluation has 0.9",
    )
    add("--loss_type", choices=LOSS_TYPES, default="InfoNCE", help="of the student and of what trains on the pairs")
    add(
        "--student_temperature",
        type=positive,
        default=RELEASED_STUDENT,
        help="temperature of the student's loss; 1 / ln(1 / 0.07), that of the released student, if not given",
    )
    add(
        "--blend_alpha",
        type=rate,
        default=0.0,
        help="the student mixes the embeddings of each pair with another's by a weight from Beta(a, a); 0 for none",
    )
    add(
        "--syn_aug",
        nargs="*",
        action=_Operations,
        default=[],
        choices=OPERATIONS,
        metavar="OP",
        help=f"students see the learned pictures augmented, anew each iteration, by some of {', '.join(OPERATIONS)}; "
        "without a name by all but flip",
    )
    add(
        "--syn_views",
        type=number(int, least=0),
        default=0,
        metavar="K",
        help="students see each real picture that is mixed or kept as it is or in one of K augmented views of it, "
        "drawn anew each iteration",
    )
    student.add_bool(
        "no_aug", False, "kept for compatibility: that is of experts' real pictures; for learned ones see --syn_aug"
    )


def _add_outer_flags(parser: Parser) -> None:
    add = parser.section("outer loop").add_argument
    add("--Iteration", type=number(int, least=0), default=3000, help="distillation iterations")
    add("--encoders_per_step", type=count, help="draw so many of the image encoders each iteration; all if not given")
    add("--segments", type=count, default=1, help=SEGMENTS_HELP)
    add(
        "--optimizer",
        choices=OPTIMIZERS,
        default="sgd",
        help="of the pairs: sgd as published, or adam, whose rates are relative to the spread of pixels and texts",
    )
    add("--lr_img", type=rate, help="rate of the pixels: 1000 with sgd, 0.03 standard deviations with adam")
    add("--lr_txt", type=rate, help="rate of the text embeddings: 1000 with sgd, 0.03 standard deviations with adam")
    add("--lr_lr", type=rate, help="rate of the learned rates: 0.01 with sgd, 0.02 of their logarithm with adam")
    add("--lr_sim", type=rate, help="rate of the soft targets: 10 with sgd, 0.03 with adam")
    add("--ema_decay", type=number(float, least=0, below=1), default=0.0, help=EMA_HELP)
    add(
        "--adjoint_decay",
        type=number(float, least=0, most=1),
        default=1.0,
        help="how much of an earlier step's effect on the later ones the gradient keeps: 1 is exact, 0 is TESLA's",
    )


def _add_output_flags(parser: Parser) -> None:
    output = parser.section("output")
    add = output.add_argument
    add("--save_dir", default="./runs/distill", help="run folder for sets, pictures and logs")
    output.add_bool("resume", False, "continue the run in --save_dir")
    output.add_bool("draw", True, "save picture grids with captions")
    output.add_bool("report", True, "keep report.html in the run folder up to date: one page of the run")
    add("--coreset", nargs="+", default=[], metavar="FILE", help="sets that the report compares the pairs with")
    output.add_bool("std", True, "log mean and standard deviation over networks as Mean/... and Std/...")
