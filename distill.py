"""Learns synthetic pairs by matching the trajectories of experts (bi-trajectory matching).

Each iteration starts a student at an expert's epoch, takes syn_steps contrastive steps on the pairs, and sends
the gradient of its distance to where the expert went back into pictures, text embeddings and learning rates.
"""

import functools
import shlex
import sys
from pathlib import Path

import torch
from safetensors import SafetensorError
from tqdm import tqdm

from data.errors import InputError
from networks.clip_model import trained_parameters
from utils import cli
from utils.experts import check_epochs, find_trajectories, stored_lora
from utils.log import Log
from utils.matching import (
    OutOfMemory,
    PairLearner,
    Pairs,
    Prefetch,
    StudentLoss,
    draw_batches,
    fit_pair_chunk,
    guarded,
    matching_gradient,
    pair_chunk_advice,
    prepare,
    to_device,
)
from utils.report import RunReport, Sources
from utils.scoring import (
    TEST_SEED,
    VALIDATION_SEED,
    NonFiniteLoss,
    check_num_queries,
    evaluate_synset,
    mean_and_std,
    nearest_captions,
    recall_table,
)
from utils.setup import (
    describe_training,
    find_device,
    find_split,
    initial_pairs,
    make_factory,
    make_text_encoder,
    retrieval_pairs,
    training_pairs,
)
from utils.synset import SynSet, load_synset, picture_grid, save_synset

# What may differ between a run and its continuation.
FREE_ON_RESUME = {
    *("Iteration", "resume", "save_dir", "name", "disabled_wandb", "draw", "std", "num_workers", "device", "cache_dir"),
    *("image_root", "ann_root", "buffer_path", "pair_chunk", "report", "coreset"),
}

# A student that stays put has matching loss 2; one on real pairs may well begin a little above.
FAR_ASTRAY = 4


def parse_args(argv=None):
    parser = cli.Parser(prog="distill.py", description=__doc__)
    add = parser.add_argument
    add("--buffer_path", default="./buffers", help="folder given to buffer.py, or the one the experts lie in")
    add("--save_dir", default="./runs/distill", help="run folder for sets, pictures and logs")
    parser.add_bool("resume", False, "continue the run in --save_dir")
    add("--Iteration", type=cli.number(int, least=0), default=3000, help="distillation iterations")
    add("--eval_it", type=cli.count, default=50, help="evaluate and save every so many iterations")
    add("--num_queries", type=cli.count, default=100, help="number of synthetic pairs")
    add("--mini_batch_size", type=cli.count, default=100, help="pairs per student step, at most num_queries")
    add("--pair_chunk", type=cli.count, help="pairs per student step in memory at a time; what fits if not given")
    add("--syn_steps", type=cli.count, default=8, help="student steps per iteration")
    add("--expert_epochs", type=cli.count, default=1, help="epochs from the student's start to the expert's target")
    add("--max_start_epoch", type=cli.count, default=2, help="students start at an epoch below this")
    add("--lr_img", type=cli.rate, default=1000.0, help="learning rate of the synthetic pixels")
    add("--lr_txt", type=cli.rate, default=1000.0, help="learning rate of the synthetic text embeddings")
    add("--lr_lr", type=cli.rate, default=1e-2, help="learning rate of the learned learning rates")
    add("--lr_teacher_img", type=cli.positive, default=0.1, help="first value of the image tower's learned rate")
    add("--lr_teacher_txt", type=cli.positive, default=0.1, help="first value of the text tower's learned rate")
    add("--pix_init", choices=("real", "noise"), default="real", help="pixels start from real pictures or noise")
    add("--txt_init", choices=("real", "noise"), default="real", help="texts start from real captions or noise")
    parser.add_bool("image_only", False, "learn the pictures (and rates), keep the real texts: an ablation")
    parser.add_bool("text_only", False, "learn the texts (and rates), keep the real pictures: an ablation")
    add("--max_files", type=cli.count, help="read at most so many expert files")
    add("--max_experts", type=cli.count, help="read at most so many experts of a file (released layout)")
    parser.add_bool("draw", True, "save picture grids with captions")
    parser.add_bool("report", True, "keep report.html in the run folder up to date: one page of the run")
    add("--coreset", nargs="+", default=[], metavar="FILE", help="sets that the report compares the pairs with")
    parser.add_bool("std", True, "log mean and standard deviation over networks as Mean/... and Std/...")
    parser.add_bool("no_aug", False, "kept for compatibility: synthetic pairs are never augmented")
    cli.add_evaluation_flags(parser)
    cli.add_data_flags(parser)
    cli.add_network_flags(parser)
    cli.add_run_flags(parser)
    cli.add_log_flags(parser)
    return parser.parse(argv, defaults=lambda args: stored_lora(args.buffer_path, vars(args)))


@cli.one_line_errors
def main(argv=None):
    args = parse_args(argv)
    check_frozen(args)
    run = Path(args.save_dir)
    check_run_folder(run, args.resume)
    device = find_device(args)

    # Fresh models, and the experts to match.
    splits = {split: find_split(args, split) for split in ("train", "val", "test")}
    check_num_queries(args.num_queries, len(splits["train"][1]))
    text_encoder = make_text_encoder(args)
    factory = make_factory(args, text_encoder.width)
    judge = make_factory(args, text_encoder.width, train_in_full=True) if args.eval_full else factory
    model = factory.fresh(args.seed)
    training = describe_training(factory, model)
    settings = {**vars(args), **training}
    start = trained_parameters(model)
    experts = find_trajectories(args.buffer_path, settings, start, args.max_files, args.max_experts)
    check_epochs(experts, args.max_start_epoch, args.expert_epochs)

    # The real pairs, and the synthetic ones.
    real, real_embed = training_pairs(args, splits["train"], text_encoder)
    validation, test = (retrieval_pairs(args, splits[split], text_encoder) for split in ("val", "test"))
    del text_encoder
    pairs = initial_pairs(args, real, real_embed, factory.encoder, device)
    lr_img, lr_txt = 0.0 if args.text_only else args.lr_img, 0.0 if args.image_only else args.lr_txt
    learner = PairLearner(pairs, lr_img, lr_txt, args.lr_lr)
    if args.resume:
        learner.load(run / "state.safetensors", vars(args), FREE_ON_RESUME)
        check_progress(run, learner.iteration, args.Iteration)
    command = shlex.join(["distill.py", *(sys.argv[1:] if argv is None else argv)])
    compared = factory, judge, experts, args.coreset
    sources = Sources(command, vars(args), real.captions, real_embed, validation, test, *compared)
    page = RunReport(run, sources, args.report)
    log = Log(run, settings, args.name, args.disabled_wandb)
    log(training, step=learner.iteration)
    loss_fn = StudentLoss(model, args.temperature)
    pair_chunk = args.pair_chunk or fit_pair_chunk(loss_fn, start, pairs, min(args.mini_batch_size, args.num_queries))

    def current_set() -> SynSet:
        captions = nearest_captions(pairs.text_syn, real_embed, real.captions)
        return as_set(pairs, captions, factory.encoder, args, learner.iteration)

    def save_progress():
        if not learner.is_finite():
            return  # the set of the last evaluation stays
        save_synset(run / "last.safetensors", current_set())
        learner.save(run / "state.safetensors", vars(args))

    prefetch = Prefetch(lambda iteration: read_iteration(experts, iteration, args, device), args.Iteration)
    bar = tqdm(total=args.Iteration, desc="distill", initial=learner.iteration, disable=None)
    try:
        while True:
            iteration = learner.iteration
            is_last = iteration >= args.Iteration
            if iteration != learner.evaluated and (iteration % args.eval_it == 0 or is_last):
                synset = current_set()
                results = score(synset, validation, VALIDATION_SEED, judge, args)
                keep_if_best(synset, results, learner, run)
                save_progress()
                report(log, run, synset, results, args)
                page.update()
            if is_last:
                break

            start_epoch, start, target, batches, seed = prefetch.take(iteration)
            start, target = to_device(start, device), to_device(target, device)
            matching = match(loss_fn, start, target, pairs, batches, seed, pair_chunk)
            check_finite(matching, iteration)
            learner.step(matching.gradient)
            log_iteration(log, bar, matching, pairs, start_epoch, iteration)
            bar.update()
    except (InputError, KeyboardInterrupt) as error:
        # After an InputError the pairs may be spoilt: the set of the last evaluation stays.
        if isinstance(error, (OutOfMemory, KeyboardInterrupt)):
            save_progress()
        if (run / "last.safetensors").exists():
            print(f"stopped at iteration {learner.iteration}; the last good set is {run / 'last.safetensors'}")
        raise
    finally:
        bar.close()
        prefetch.close()

    best = load_synset(run / "best.safetensors")
    results = score(best, test, TEST_SEED, judge, args, page.on_model)
    log({f"Test/{key}": value for key, value in mean_and_std(results)[0].items()}, step=args.Iteration)
    print(f"best set by validation: {run / 'best.safetensors'}, iteration {best.settings['iteration']}; test split:")
    print(recall_table({f"{args.num_queries} distilled pairs, training {judge.trains}": results}))
    page.finish(log, best, results)
    log.finish()


def check_frozen(args) -> None:
    """Raises InputError if --image_only or --text_only leaves nothing to learn, or noise as it is."""
    if args.image_only and args.text_only:
        raise InputError("--image_only and --text_only exclude each other; give one, or neither to learn both")
    if (args.image_only and args.txt_init == "noise") or (args.text_only and args.pix_init == "noise"):
        raise InputError("the modality that is not learned must start from real values; drop its noise init")


def check_run_folder(run: Path, resume: bool) -> None:
    """Refuses to write over a run, or to continue one that is not there."""
    exists = (run / "state.safetensors").exists()
    if exists and not resume:
        raise InputError(f"{run} already holds a run; add --resume to continue it or give another --save_dir")
    if resume and not exists:
        raise InputError(f"{run} holds no run to resume; check --save_dir")


def check_progress(run: Path, done: int, iterations: int) -> None:
    if done > iterations:
        raise InputError(f"{run} has {done} iterations already, --Iteration is {iterations}; give {done} or more")


def draw_iteration(experts, iteration: int, args):
    """Expert, start epoch, the steps' mini-batches and their seed: a function of the seed and the iteration."""
    generator = torch.Generator().manual_seed(args.seed * 1_000_003 + iteration)
    expert = experts[torch.randint(len(experts), (), generator=generator)]
    start_epoch = torch.randint(args.max_start_epoch, (), generator=generator).item()
    batches = draw_batches(args.num_queries, args.mini_batch_size, args.syn_steps, generator)
    step_seed = torch.randint(2**40, (), generator=generator).item()
    return expert, start_epoch, batches, step_seed


def read_iteration(experts, iteration: int, args, device):
    """Start epoch, the expert's snapshots there and at the target, batches and seed; snapshots as `to_device` wants."""
    expert, start_epoch, batches, seed = draw_iteration(experts, iteration, args)
    epochs = start_epoch, start_epoch + args.expert_epochs
    try:
        start, target = (prepare(expert.snapshot(epoch), device) for epoch in epochs)
    except (OSError, SafetensorError) as error:
        raise InputError(f"expert {expert.path} can no longer be read ({error}); check the disk") from error
    return start_epoch, start, target, batches, seed


def match(loss_fn, start, target, pairs, batches, seed, pair_chunk):
    """`matching_gradient`; raises OutOfMemory with the flag that helps."""
    return guarded(
        lambda: matching_gradient(loss_fn, start, target, pairs, batches, seed, pair_chunk),
        lambda: pair_chunk_advice(min(pair_chunk or len(batches[0]), len(batches[0]))),
    )


def as_set(pairs: Pairs, captions, encoder, args, iteration: int) -> SynSet:
    """A copy of the current pairs with all that is needed to train on them elsewhere."""
    image_syn, text_syn, lr_img, lr_txt = (tensor.detach().clone() for tensor in pairs.tensors())
    distilled = "distilled images" if args.image_only else "distilled texts" if args.text_only else "distilled"
    settings = {**vars(args), "method": distilled if iteration else "initial", "iteration": iteration}
    return SynSet(image_syn, text_syn, lr_img.item(), lr_txt.item(), captions, encoder.mean, encoder.std, settings)


def score(synset: SynSet, retrieval, seed: int, factory, args, on_model=None) -> list[dict]:
    sizes = args.num_eval, args.epoch_eval_train, args.batch_train, args.batch_size_test, args.image_size
    problem = factory, synset, retrieval, *sizes, args.temperature, seed + args.seed, on_model
    train, test = max(1, min(args.batch_train, args.num_queries) // 2), max(1, args.batch_size_test // 2)
    try:
        return guarded(
            functools.partial(evaluate_synset, *problem),
            lambda: f"give --batch_train {train} and --batch_size_test {test}",
        )
    except NonFiniteLoss as error:
        iteration = synset.settings["iteration"]
        flags = "--lr_img, --lr_txt or --lr_lr" if iteration else "--lr_teacher_img or --lr_teacher_txt"
        raise InputError(
            f"the loss of a network trained on the set of iteration {iteration} became {error.loss}; lower {flags}"
        ) from error


def keep_if_best(synset: SynSet, results, learner: PairLearner, run: Path) -> None:
    """Saves the set under its iteration, and as the best one if it is by validation."""
    save_synset(run / f"iteration_{learner.iteration:06d}.safetensors", synset)
    recall = mean_and_std(results)[0]["r_mean"]
    if recall > learner.best:
        save_synset(run / "best.safetensors", synset)
        learner.best = recall
    learner.evaluated = learner.iteration


def check_finite(matching, iteration: int) -> None:
    numbers = [matching.loss, *(gradient.sum() for gradient in matching.gradient.tensors())]
    if not torch.isfinite(torch.stack(numbers)).all():
        losses = " ".join(f"{loss:.2f}" for loss in matching.student_losses.tolist())
        raise InputError(
            f"matching loss {matching.loss.item():.4g} or its gradient is not finite at iteration {iteration} (student "
            f"losses {losses}); lower --lr_teacher_img, --lr_teacher_txt, --lr_lr, --lr_img, --lr_txt or --syn_steps"
        )


def log_iteration(log, bar, matching, pairs, start_epoch, iteration: int) -> None:
    losses = matching.student_losses.tolist()
    values = {
        "Grand_Loss": matching.loss.item(),
        "Image_Loss": matching.image_loss.item(),
        "Text_Loss": matching.text_loss.item(),
        "Start_Epoch": start_epoch,
        "Student_Loss_First": losses[0],
        "Student_Loss_Last": losses[-1],
        "Synthetic_LR_Image": pairs.syn_lr_img.item(),
        "Synthetic_LR_Text": pairs.syn_lr_txt.item(),
        "Grad_Norm_Image": matching.gradient.image_syn.norm().item(),
        "Grad_Norm_Text": matching.gradient.text_syn.norm().item(),
    }
    log(values, step=iteration)
    bar.set_postfix(loss=f"{values['Grand_Loss']:.3f}", student=f"{losses[0]:.2f}>{losses[-1]:.2f}", refresh=False)
    if iteration == 0 and (losses[-1] > losses[0] or values["Grand_Loss"] > FAR_ASTRAY):
        tqdm.write(
            f"warning: the student goes astray (its losses {losses[0]:.2f} to {losses[-1]:.2f}, matching loss "
            f"{values['Grand_Loss']:.2f}, where 2 is a student that stays put); "
            "lower --lr_teacher_img, --lr_teacher_txt or --syn_steps"
        )


def report(log, run: Path, synset: SynSet, results, args) -> None:
    """Prints and logs an evaluation; with --draw saves and shows the picture grid."""
    iteration = synset.settings["iteration"]
    mean, std = mean_and_std(results)
    values = dict(mean)
    if args.std:
        values |= {f"Mean/{k}": v for k, v in mean.items()} | {f"Std/{k}": v for k, v in std.items()}
    log(values, step=iteration)
    tqdm.write(
        f"iteration {iteration}: validation TR@1 {mean['txt_r1']:.1f} IR@1 {mean['img_r1']:.1f} "
        f"mean {mean['r_mean']:.1f} ± {std['r_mean']:.1f}, rates {synset.syn_lr_img:.4f} {synset.syn_lr_txt:.4f}"
    )
    log.media(iteration, texts={"Synthetic_Sentences": synset.captions}, histograms={"Pixels": synset.image_syn})
    if args.draw:
        grid = picture_grid(synset)
        grid.save(run / f"synthetic_images_{iteration:06d}.png")
        log.media(iteration, pictures={"Synthetic_Images": grid})


if __name__ == "__main__":
    sys.exit(main())
