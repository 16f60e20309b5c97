"""Learns synthetic pairs by matching the trajectories of experts (bi-trajectory matching).

Each iteration starts a student at an expert's epoch, takes syn_steps contrastive steps on the pairs, and sends
the gradient of its distance to where the expert went back into pictures, text embeddings and learning rates.
"""

import functools
import shlex
import statistics
import sys
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from tqdm import tqdm

from data.errors import InputError
from networks.clip_model import trained_parameters
from networks.loss import PairLoss
from utils import cli, ranks
from utils.device import describe_device
from utils.experts import Shortcut, check_epochs, check_loss, find_trajectories, stored_lora
from utils.log import open_log
from utils.matching import (
    FIT,
    Draws,
    OutOfMemory,
    PairLearner,
    Prefetch,
    fit_first_rates,
    fit_pair_chunk,
    guarded,
    pair_chunk_advice,
)
from utils.report import RunReport, Sources
from utils.scoring import (
    TEST_SEED,
    VALIDATION_SEED,
    NonFiniteLoss,
    check_num_queries,
    embedded_once,
    evaluate_synset,
    mean_and_std,
    nearest_captions,
    recall_table,
)
from utils.sets import Pairs, SynSet, load_synset, picture_grid, save_synset
from utils.setup import (
    check_encoder_features,
    describe_training,
    find_device,
    find_split,
    initial_pairs,
    make_factory,
    make_text_encoder,
    retrieval_pairs,
    training_pairs,
    warn_of_shared_pictures,
)
from utils.student import StudentLoss, check_shares, mean_matching

# What may differ between a run and its continuation.
FREE_ON_RESUME = {
    *("Iteration", "resume", "save_dir", "name", "disabled_wandb", "draw", "std", "num_workers", "device", "cache_dir"),
    *("image_root", "ann_root", "buffer_path", "pair_chunk", "recipe", "report", "coreset"),
}
# What runs were made with that lack a setting; their student had the temperature of the experts.
ADDED = {
    **{"optimizer": "sgd", "student_momentum": 0.0, "adjoint_decay": 1.0, "only_has_image_projection": False},
    **{"loss_type": "InfoNCE", "sim_type": "none", "ema_decay": 0.0, "blend_alpha": 0.0},
    **{"batch_order": "independent", "phases": 1, "segments": 1, "shortcut": None, "init_set": None},
    "split_seed": 0,
}


def parse_args(argv=None):
    parser = cli.Parser(prog="distill.py", description=__doc__)
    cli.add_recipe_flag(parser)
    cli.add_data_flags(parser)
    cli.add_network_flags(parser)
    cli.add_run_flags(parser)
    cli.add_distillation_flags(parser)
    cli.add_evaluation_flags(parser)
    cli.add_log_flags(parser)
    return parser.parse(argv, defaults=lambda args: stored_lora(args.buffer_path, vars(args)))


@cli.one_line_errors
def main(argv=None):
    args = parse_args(argv)
    check_start(args)
    check_targets(args)
    check_run_folder(Path(args.save_dir), args.resume)
    run = Distillation(args, shlex.join(["distill.py", *(sys.argv[1:] if argv is None else argv)]))
    with saved_when_stopped(run):
        while True:
            if run.is_due():
                run.evaluate()
            if run.learner.iteration == args.Iteration:
                break
            run.match_and_step()
    run.report_test()


class Distillation:
    """One run: the experts, the real pairs, and the synthetic ones that are learned from them.

    `command` is the command line, for the report.
    """

    def __init__(self, args, command: str):
        self.args, self.folder, device = args, Path(args.save_dir), find_device(args)
        print(describe_device(device))

        # What is read, downloaded and cached; fresh models, and the experts to match.
        with ranks.first_goes_first():
            splits = {split: find_split(args, split) for split in ("train", "val", "test")}
            warn_of_shared_pictures(*splits.values())
            check_num_queries(args.num_queries, len(splits["train"][1]))
            text_encoder = make_text_encoder(args)
            self.factory = factory = make_factory(args, text_encoder.width)
            self.judge = make_factory(args, text_encoder.width, train_in_full=True) if args.eval_full else factory
            self.real, self.real_embed = training_pairs(args, splits["train"], text_encoder)
            scored = [retrieval_pairs(args, splits[split], text_encoder) for split in ("val", "test")]
        del text_encoder
        model = factory.fresh(args.seed, PairLoss(args.loss_type, args.student_temperature))
        training = describe_training(factory, model)
        settings = {**vars(args), **training}
        start = trained_parameters(model)
        experts = find_trajectories(args.buffer_path, settings, start, args.max_files, args.max_experts)
        check_epochs(experts, args.max_start_epoch, args.expert_epochs, args.phases, args.shortcut)
        check_loss(experts, args.loss_type)
        ways = [Shortcut(expert, args.shortcut) for expert in experts] if args.shortcut else experts

        # The real pairs, and the synthetic ones.
        judged = self.judge, args.batch_size_test, args.cache_dir
        self.validation, self.test = (embedded_once(split, *judged) for split in scored)
        self.pairs = initial_pairs(args, self.real, self.real_embed, factory.encoder, device)
        ranks.take_from_first(self.pairs.tensors())

        # The student, and what it reads ahead.
        self.loss_fn = StudentLoss(model, args.alpha, args.blend_alpha)
        batch_size = min(args.mini_batch_size or args.num_queries, args.num_queries)
        self.student = {"momentum": args.student_momentum, "adjoint_decay": args.adjoint_decay}
        trial = self.loss_fn, start, self.pairs, batch_size
        self.pair_chunk = args.pair_chunk or fit_pair_chunk(*trial, **self.student)
        check_shares(*trial, self.pair_chunk)
        of_student = args.num_queries, batch_size, args.syn_steps, args.max_start_epoch
        of_student += args.expert_epochs, args.batch_order, args.phases, args.Iteration, args.segments
        self.draws = Draws(ways, args.seed, *of_student)
        self.prefetch = Prefetch(lambda iteration: self.draws.read(iteration, device), args.Iteration)

        # The learner, which moves the pairs from the first ones or from where the run was.
        if not args.resume:
            self.fit_first_rates(self.draws.read(0, device))
        lr_img, lr_txt = 0.0 if args.text_only else args.lr_img, 0.0 if args.image_only else args.lr_txt
        rates = lr_img, lr_txt, args.lr_lr, args.optimizer, args.lr_sim
        self.learner = PairLearner(self.pairs, *rates, args.ema_decay)
        if args.resume:
            free = FREE_ON_RESUME - {"Iteration"} if args.phases > 1 else FREE_ON_RESUME  # a phase is a part of them
            added = {**ADDED, "student_temperature": args.temperature}
            self.learner.load(self.folder / "state.safetensors", vars(args), free, added)
            check_progress(self.folder, self.learner.iteration, args.Iteration)

        # The page and the log.
        compared = factory, self.judge, experts, args.coreset
        texts = self.real.captions, self.real_embed
        sources = Sources(command, vars(args), *texts, self.validation, self.test, *compared)
        self.page = RunReport(self.folder, sources, args.report and ranks.is_first())
        self.log = open_log(self.folder, settings, args.name, args.disabled_wandb)
        self.log(training, step=self.learner.iteration)
        self.bar = tqdm(
            total=args.Iteration,
            desc="distill",
            initial=self.learner.iteration,
            disable=None if ranks.is_first() else True,
        )

    def guarded_matching(self, function, segments, *problem):
        """`function` of the student on `segments`; halves a chunk that was not given where memory is full."""
        batch = len(segments[0].batches[0])
        while True:
            size = min(self.pair_chunk or batch, batch)
            try:
                return guarded(
                    lambda: function(self.loss_fn, segments, *problem, self.pair_chunk, **self.student),
                    lambda size=size: pair_chunk_advice(size),
                )
            except OutOfMemory:
                # One rank alone cannot change its chunk: the others wait for its part of the old one.
                if self.args.pair_chunk or size == 1 or ranks.count() > 1:
                    raise
            self.pair_chunk = size // 2
            tqdm.write(f"CUDA is out of memory with {size} pairs at a time; going on with {self.pair_chunk}")

    def fit_first_rates(self, segments) -> None:
        """Chooses the first rates that are to fit, if any, on the segments of the first iteration."""
        given = {"syn_lr_img": self.args.lr_teacher_img, "syn_lr_txt": self.args.lr_teacher_txt}
        names = [name for name, rate in given.items() if rate == FIT]
        if not names:
            return
        for name, rate in self.guarded_matching(fit_first_rates, segments, self.pairs, names).items():
            getattr(self.pairs, name).fill_(rate)
        print(f"first student rates, fitted: {self.pairs.syn_lr_img:.3g} {self.pairs.syn_lr_txt:.3g}")

    def is_due(self) -> bool:
        """Whether the pairs are to be scored before the next step."""
        iteration = self.learner.iteration
        is_round = iteration % self.args.eval_it == 0 or iteration == self.args.Iteration
        return is_round and iteration != self.learner.evaluated

    def match_and_step(self) -> None:
        """One iteration: student and expert, the gradient of the matching loss, a step of the pairs."""
        iteration = self.learner.iteration
        if self.draws.begins_phase(iteration):
            self.learner.begin_phase()
        segments = self.prefetch.take(iteration)
        matching = self.guarded_matching(mean_matching, segments, self.pairs)
        gradient, warnings = self.learner.guard.limit(matching, self.pairs, iteration)
        self.learner.step(gradient)
        log_iteration(self.log, self.bar, matching, self.learner, segments, iteration)
        for line in warnings:
            tqdm.write(line)
        self.bar.update()

    def evaluate(self) -> None:
        """Scores the pairs on validation, keeps the best set, saves the run."""
        synset = self.current_set()
        results = score(synset, self.validation, VALIDATION_SEED, self.judge, self.args)
        keep_if_best(synset, results, self.learner, self.folder)
        self.save()
        if ranks.is_first():
            report(self.log, self.folder, synset, results, self.args)
            with ranks.alone():
                self.page.update()
        ranks.wait()

    def report_test(self) -> None:
        """Scores the set that did best on validation on the test split."""
        best = load_synset(self.folder / "best.safetensors")
        results = score(best, self.test, TEST_SEED, self.judge, self.args, self.page.on_model)
        if not ranks.is_first():
            return
        mean = mean_and_std(results)[0]
        self.log({f"Test/{key}": value for key, value in mean.items()}, step=self.args.Iteration)
        iteration = best.settings["iteration"]
        print(f"best set by validation: {self.folder / 'best.safetensors'}, iteration {iteration}; test split:")
        print(recall_table({f"{self.args.num_queries} distilled pairs, training {self.judge.trains}": results}))
        pictures = f"pictures in {self.folder}/synthetic_images_*.png, " if self.args.draw else ""
        print(f"sets in {self.folder}/iteration_*.safetensors, {pictures}numbers in {self.folder}/metrics.jsonl")
        with ranks.alone():
            self.page.finish(self.log, best, results)
        self.log.finish()

    def current_set(self) -> SynSet:
        pairs = self.learner.averaged
        captions = nearest_captions(pairs.text_syn, self.real_embed, self.real.captions)
        return as_set(pairs, captions, self.factory.encoder, self.args, self.learner.iteration)

    def save(self) -> None:
        """Saves the set and the state; after a spoilt step those of the last evaluation stay."""
        if ranks.is_first() and self.learner.is_finite():
            save_synset(self.folder / "last.safetensors", self.current_set())
            self.learner.save(self.folder / "state.safetensors", vars(self.args))


@contextmanager
def saved_when_stopped(run: Distillation):
    """Saves the run when it is stopped, and says where its last good set is."""
    try:
        yield
    except (InputError, KeyboardInterrupt) as error:
        # After an InputError the pairs may be spoilt: the set of the last evaluation stays.
        if isinstance(error, (OutOfMemory, ranks.RankLost, KeyboardInterrupt)):
            run.save()
        last = run.folder / "last.safetensors"
        if last.exists():
            print(f"stopped at iteration {run.learner.iteration}; the last good set is {last}")
        raise
    finally:
        run.bar.close()
        run.prefetch.close()


def check_start(args) -> None:
    """Raises InputError for first pairs that cannot be, or if nothing is learned, or noise stays as it is."""
    if args.image_only and args.text_only:
        raise InputError("--image_only and --text_only exclude each other; give one, or neither to learn both")
    if args.init_set and args.pix_init == "kmeans":
        raise InputError("--init_set and --pix_init kmeans both give the first pairs; drop one")
    if args.pix_init == "kmeans":
        check_encoder_features(args, "--pix_init kmeans")
    if (args.image_only and args.txt_init == "noise") or (args.text_only and args.pix_init == "noise"):
        raise InputError("the modality that is not learned must start from real values; drop its noise init")


def check_targets(args) -> None:
    """Raises InputError for soft targets, blending or phases that do not go with the rest."""
    if args.sim_type != "none" and args.loss_type == "InfoNCE":
        raise InputError(f"--loss_type InfoNCE has hard targets; give NCE, BCE or WBCE with --sim_type {args.sim_type}")
    if args.blend_alpha and args.image_trainable:
        raise InputError("--blend_alpha mixes what a frozen image encoder gives; add --image_trainable False")
    if args.phases > args.num_queries:
        raise InputError(f"--phases {args.phases} is more than the {args.num_queries} pairs; lower it")


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


def as_set(pairs: Pairs, captions, encoder, args, iteration: int) -> SynSet:
    """A copy of the current pairs with all that is needed to train on them elsewhere."""
    image_syn, text_syn, lr_img, lr_txt, *similarity = (tensor.detach().clone() for tensor in pairs.tensors())
    distilled = "distilled images" if args.image_only else "distilled texts" if args.text_only else "distilled"
    settings = {**vars(args), "method": distilled if iteration else "initial", "iteration": iteration}
    synset = SynSet(image_syn, text_syn, lr_img.item(), lr_txt.item(), captions, encoder.mean, encoder.std, settings)
    targets = {"similarity": tuple(similarity), "alpha": args.alpha, "loss_type": args.loss_type}
    return replace(synset, **targets, phases=args.phases)


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
    recall = mean_and_std(results)[0]["r_mean"]
    names = [f"iteration_{learner.iteration:06d}", *(["best"] if recall > learner.best else [])]
    for name in names if ranks.is_first() else ():
        save_synset(run / f"{name}.safetensors", synset)
    learner.best = max(recall, learner.best)
    learner.evaluated = learner.iteration


def log_iteration(log, bar, matching, learner: PairLearner, segments, iteration: int) -> None:
    losses = matching.student_losses.tolist()
    values = {
        "Grand_Loss": matching.loss.item(),
        "Image_Loss": matching.image_loss.item(),
        "Text_Loss": matching.text_loss.item(),
        "Start_Epoch": statistics.mean(segment.start_epoch for segment in segments),
        "Student_Loss_First": losses[0],
        "Student_Loss_Last": losses[-1],
        "Synthetic_LR_Image": learner.pairs.syn_lr_img.item(),
        "Synthetic_LR_Text": learner.pairs.syn_lr_txt.item(),
        "Grad_Norm_Image": matching.gradient.image_syn.norm().item(),
        "Grad_Norm_Text": matching.gradient.text_syn.norm().item(),
        "Limited_Gradients": learner.guard.limited,
    }
    log(values, step=iteration)
    bar.set_postfix(loss=f"{values['Grand_Loss']:.3f}", student=f"{losses[0]:.2f}>{losses[-1]:.2f}", refresh=False)


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
        with log.aside("the picture grid"):
            grid = picture_grid(synset)
            grid.save(run / f"synthetic_images_{iteration:06d}.png")
            log.media(iteration, pictures={"Synthetic_Images": grid})


if __name__ == "__main__":
    sys.exit(main())
