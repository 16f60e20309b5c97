"""Learns synthetic pairs by matching the trajectories of experts (bi-trajectory matching).

Each iteration starts a student at an expert's epoch, takes syn_steps contrastive steps on the pairs, and sends
the gradient of its distance to where the expert went back into pictures, text embeddings and learning rates.
"""

import sys
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from tqdm import tqdm

from data.errors import InputError
from data.whole import replacing
from utils import cli, ranks
from utils.cli.checks import check_encoders, check_first_pairs, check_pictures, check_sentences, check_targets
from utils.cli.errors import guarded_scoring
from utils.cli.resume import check_run_folder, resume, state_file
from utils.device import describe_device
from utils.experts import stored_lora
from utils.log import open_log
from utils.matching import OutOfMemory, Prefetch, iteration_numbers
from utils.report import RunReport, Sources
from utils.scoring import (
    TEST_SEED,
    VALIDATION_SEED,
    evaluate_synset,
    mean_and_std,
    nearest_captions,
    recall_table,
)
from utils.sets import Pairs, SynSet, as_synset, load_synset, picture_grid, save_synset, shown_command
from utils.setup import (
    Backbone,
    Student,
    args_of_encoders,
    draw_encoders,
    encoder_names,
    find_device,
    first_pairs,
    make_evaluation,
    make_learner,
    mean_share,
    open_backbones,
    open_data,
    open_dictionary,
    pairs_of_encoder,
    plan_distillation,
    seen_pictures,
)
from utils.student import mean_matching, mean_over_encoders, pulled_back


def parse_args(argv=None):
    parser = cli.Parser(prog="distill.py", description=__doc__)
    cli.add_recipe_flag(parser)
    cli.add_data_flags(parser)
    cli.add_network_flags(parser)
    cli.add_run_flags(parser)
    cli.add_distillation_flags(parser)
    cli.add_evaluation_flags(parser)
    cli.add_log_flags(parser)
    cli.add_plan_flag(parser)
    return parser.parse(argv, defaults=lambda args: stored_lora(args.buffer_path, vars(args)))


def distill(run: "Distillation") -> None:
    """The algorithm. All else in this file sets it up, scores it, shows it and saves it."""
    learner = run.learner
    while True:
        # Every eval_it iterations, and at the end: train fresh networks on the pairs, save the set, keep the best one.
        if run.is_due():
            run.evaluate_and_save()
        if learner.iteration == run.args.Iteration:
            break

        # With --phases, each part of the pairs is a run of its own, from later epochs of the experts than the last.
        if run.backbones[0].draws.begins_phase(learner.iteration):
            learner.begin_phase()

        # Pick an expert and a start epoch s, and the mini-batches of pairs that the student will see: --segments times,
        # for each of several image encoders.
        segments = run.prefetch.take(learner.iteration)

        # The pairs as all students of the iteration see them. Pictures: what is learned as its form renders it
        # (--pix_param, --pix_limit), with --syn_aug in new views; by this graph their gradient goes back to what is
        # learned. Texts: with --txt_param mixture sums of few sentences, whose gradient moves the free texts behind
        # them, straight through the choice of sentences (Bengio et al., 2013).
        seen = run.seen_pairs(learner.iteration)

        # From θ*_s the student takes syn_steps steps on the mini-batches, with the learned rates (utils/student/).
        # Its distance to where the expert landed, θ*_{s+R}, over the expert's own way, is the matching loss.
        # The gradient goes back through every step into pictures, texts and rates.
        # Steps, distance and gradient are one call: steps are taken again on the way back, in the memory of one.
        # `unroll` in tests/unroll.py is the definition: loss and gradient must equal those of torch's own derivatives.
        matchings = {
            number: run.students[number].run(mean_matching, drawn, pairs=pairs_of_encoder(seen, number))
            for number, drawn in segments.items()
        }
        losses = {run.backbones[number].name: matching.loss.item() for number, matching in matchings.items()}
        matching = mean_over_encoders(matchings, len(run.backbones))
        matching = pulled_back(matching, seen.image_syn, learner.pairs.image_syn)

        # A gradient far outside what the run has seen is cut: one bad iteration must not throw the run away
        # (utils/matching/guard.py).
        gradient, warnings = learner.guard.limit(matching, learner.pairs, learner.iteration)

        # The step of the pairs and their rates, by SGD with momentum or Adam.
        learner.step(gradient)
        run.log_iteration(matching, segments, losses, warnings)


@cli.one_line_errors
def main(argv=None):
    args = parse_args(argv)
    is_plan = vars(args).pop("plan")
    # Refused before anything is read: flags that do not go together, and a folder that holds another run.
    check_encoders(args)
    check_first_pairs(args)
    check_pictures(args)
    check_sentences(args)
    check_targets(args)
    if is_plan:
        plan_distillation(args)
        return
    check_run_folder(args)
    run = Distillation(args, shown_command(["distill.py", *(sys.argv[1:] if argv is None else argv)]))
    with saved_when_stopped(run):  # by Ctrl-C, full memory or a lost rank
        distill(run)
    run.report_test()


class Distillation:
    """One run: the experts, the real pairs, and the synthetic ones that are learned from them.

    `command` is the command line, for the report.
    """

    def __init__(self, args, command: str):
        self.args, self.folder, self.device = args, Path(args.save_dir), find_device(args)
        print(describe_device(self.device))

        # What is read, downloaded and cached, and each image encoder with its experts; data are the same for all.
        data = open_data(args_of_encoders(args)[0], scored=("val", "test"), num_queries=args.num_queries)
        self.real, self.real_embed = data.real, data.real_embed
        self.backbones = open_backbones(args, data)
        self.settings = {**vars(args), **self.backbones[0].training}

        # The synthetic pairs. What ranks draw is the same on all, what they compute may differ in the last bit.
        self.pairs, self.form = first_pairs(args, self.real, self.real_embed, self.backbones)
        ranks.take_from_first(self.pairs.tensors())
        self.dictionary = open_dictionary(args, self.pairs.text_syn, self.real, self.real_embed)
        self.start_students()
        self.start_learner()
        self.start_log(command)

    def start_students(self) -> None:
        """The student of each encoder, and what iterations read ahead."""
        first = self.seen_pairs(0)
        self.students = [
            Student(self.args, backbone, pairs_of_encoder(first, number), self.form)
            for number, backbone in enumerate(self.backbones)
        ]
        self.prefetch = Prefetch(self.read_segments, end=self.args.Iteration)

    def read_segments(self, iteration: int) -> dict[int, list]:
        """What the iteration matches, by the number of the encoder."""
        drawn = draw_encoders(self.args, len(self.backbones), iteration)
        return {number: self.backbones[number].draws.read(iteration, self.device) for number in drawn}

    def seen_pairs(self, iteration: int) -> Pairs:
        """The pairs as the iteration's students see them; pictures with a graph back to what is learned."""
        seen = replace(self.pairs, image_syn=seen_pictures(self.args, self.form, self.pairs.image_syn, iteration))
        return replace(seen, text_syn=self.dictionary.project(seen.text_syn)) if self.dictionary else seen

    def start_learner(self) -> None:
        """The learner, which moves the pairs from the first ones or from where the run was."""
        if not self.args.resume:  # else the rates are in the saved state
            first = self.seen_pairs(0)
            for number, student in enumerate(self.students):
                student.fit_first_rates(pairs_of_encoder(first, number))
        self.learner = make_learner(self.args, self.pairs, self.form)
        if self.args.resume:
            resume(self.args, self.learner)

    def start_log(self, command: str) -> None:
        """The page, the log and the bar; ranks other than the first show nothing. The page is of the first encoder."""
        args, shown = self.args, self.backbones[0]
        sources = Sources(
            command=command,
            settings=vars(args),
            captions=self.real.captions,
            text_embed=self.real_embed,
            validation=shown.scored["val"],
            test=shown.scored["test"],
            encoder=shown.name,
            factory=shown.factory,
            judge=shown.judge,
            evaluation=make_evaluation(args),
            experts=shown.experts,
            coresets=args.coreset,
        )
        self.page = RunReport(self.folder, sources, enabled=args.report and ranks.is_first())
        self.log = open_log(self.folder, self.settings, args.name, args.disabled_wandb)
        self.log(shown.training, step=self.learner.iteration)
        hidden = None if ranks.is_first() else True  # None: where stderr is no terminal
        self.bar = tqdm(total=args.Iteration, desc="distill", initial=self.learner.iteration, disable=hidden)

    def is_due(self) -> bool:
        """Whether the pairs are to be scored before the next step."""
        iteration = self.learner.iteration
        is_round = iteration % self.args.eval_it == 0 or iteration == self.args.Iteration
        return is_round and iteration != self.learner.evaluated  # which a resumed run may have done already

    def evaluate_and_save(self) -> None:
        """Scores the pairs on validation, keeps the best set, saves the run."""
        synset = self.current_set()
        by_encoder = [self.score(synset, backbone, "val", VALIDATION_SEED) for backbone in self.backbones]
        self.keep_if_best(synset, by_encoder)
        # The others wait at the end, so that within it the first rank may score the report's other sets alone.
        if ranks.is_first():
            show_evaluation(self.log, self.folder, synset, by_encoder, self.args)
        # Not before all of it is there: what was cut off in between is done again. All ranks note it.
        self.learner.evaluated = self.learner.iteration
        self.save()
        if ranks.is_first():
            with ranks.alone():
                self.page.update()
        ranks.wait()

    def keep_if_best(self, synset: SynSet, by_encoder: list) -> None:
        """Saves the set under its iteration, and as the best one if it is by validation."""
        recall = mean_share(self.backbones, by_encoder)
        names = [f"iteration_{self.learner.iteration:06d}", *(["best"] if recall > self.learner.best else [])]
        for name in names if ranks.is_first() else ():  # the folder is shared
            save_synset(self.folder / f"{name}.safetensors", synset)
        self.learner.best = max(recall, self.learner.best)  # on all ranks: the learner's state is theirs too

    def score(self, synset: SynSet, backbone: Backbone, split: str, seed: int, on_model=None) -> list[dict]:
        """Recalls of fresh networks trained on the set; the test split has other seeds than validation."""
        evaluation, seed = make_evaluation(self.args), seed + self.args.seed
        own = synset.for_encoder(backbone.name)
        return guarded_scoring(
            lambda: evaluate_synset(backbone.judge, own, backbone.scored[split], evaluation, seed, on_model),
            synset.settings["iteration"],
            self.args,
        )

    def report_test(self) -> None:
        """Scores the set that did best on validation on the test split."""
        best = load_synset(self.folder / "best.safetensors")
        watchers = [self.page.on_model, *[None] * (len(self.backbones) - 1)]  # the page is of the first encoder
        by_encoder = [
            self.score(best, backbone, "test", TEST_SEED, watcher)
            for backbone, watcher in zip(self.backbones, watchers, strict=True)
        ]
        if not ranks.is_first():
            return
        # The set was chosen on validation, so these numbers do not flatter.
        mean = mean_and_std([recalls for results in by_encoder for recalls in results])[0]
        self.log({f"Test/{key}": value for key, value in mean.items()}, step=self.args.Iteration)
        iteration = best.settings["iteration"]
        print(f"best set by validation: {self.folder / 'best.safetensors'}, iteration {iteration}; test split:")
        label = f"{self.args.num_queries} distilled pairs, training {self.backbones[0].judge.trains}"
        names = [f" on {backbone.name}" if len(self.backbones) > 1 else "" for backbone in self.backbones]
        print(recall_table({label + name: results for name, results in zip(names, by_encoder, strict=True)}))
        pictures = f"pictures in {self.folder}/synthetic_images_*.png, " if self.args.draw else ""
        print(f"sets in {self.folder}/iteration_*.safetensors, {pictures}numbers in {self.folder}/metrics.jsonl")
        with ranks.alone():
            self.page.finish(self.log, best, dict(zip(encoder_names(vars(self.args)), by_encoder, strict=True)))
        self.log.finish()

    def log_iteration(self, matching, segments: dict, losses: dict, warnings: list[str]) -> None:
        """Logs what the step that was just taken came from."""
        numbers = iteration_numbers(matching, self.learner, next(iter(segments.values())), losses)
        self.log(numbers, step=self.learner.iteration - 1)
        student = f"{numbers['Student_Loss_First']:.2f}>{numbers['Student_Loss_Last']:.2f}"
        self.bar.set_postfix(loss=f"{numbers['Grand_Loss']:.3f}", student=student, refresh=False)
        for line in warnings:  # above the bar
            tqdm.write(line)
        self.bar.update()

    def current_set(self) -> SynSet:
        """The pairs as seen, or their average with --ema_decay, each with the real caption nearest to its text."""
        pairs, sentences = self.learner.averaged, None
        if self.dictionary:
            text_syn, sentences = self.dictionary.describe(pairs.text_syn)
            pairs = replace(pairs, text_syn=text_syn)
        captions = nearest_captions(pairs.text_syn, self.real_embed, self.real.captions)
        names = [backbone.name for backbone in self.backbones]
        return as_synset(pairs, self.form, captions, names, vars(self.args), self.learner.iteration, sentences)

    def save(self) -> None:
        """Saves the set and the state; after a spoilt step those of the last evaluation stay."""
        if ranks.is_first() and self.learner.is_finite():  # all ranks hold the same pairs
            save_synset(self.folder / "last.safetensors", self.current_set())
            self.learner.save(state_file(self.args), vars(self.args))


@contextmanager
def saved_when_stopped(run: Distillation):
    """Saves the run when it is stopped, and says where its last good set is."""
    try:
        yield
    except (InputError, KeyboardInterrupt) as error:
        # After another InputError the pairs may be spoilt: the set of the last evaluation stays.
        if isinstance(error, (OutOfMemory, ranks.RankLost, KeyboardInterrupt)):
            run.save()
        if (last := run.folder / "last.safetensors").exists():
            print(f"stopped at iteration {run.learner.iteration}; the last good set is {last}")
        raise
    finally:
        run.bar.close()
        run.prefetch.close()


def show_evaluation(log, folder: Path, synset: SynSet, by_encoder: list, args) -> None:
    """Prints and logs an evaluation; with --draw saves and shows the picture grid."""
    iteration = synset.settings["iteration"]
    mean = mean_and_std([recalls for results in by_encoder for recalls in results])[0]
    std = mean_and_std([mean_and_std(results)[1] for results in by_encoder])[0]  # over networks, not over encoders
    spread = {f"Mean/{k}": v for k, v in mean.items()} | {f"Std/{k}": v for k, v in std.items()}
    log({**mean, **(spread if args.std else {})}, step=iteration)
    tqdm.write(
        f"iteration {iteration}: validation TR@1 {mean['txt_r1']:.1f} IR@1 {mean['img_r1']:.1f} "
        f"mean {mean['r_mean']:.1f} ± {std['r_mean']:.1f}, rates {synset.syn_lr_img:.4f} {synset.syn_lr_txt:.4f}"
    )
    if len(by_encoder) > 1:
        means = dict(zip(encoder_names(vars(args)), (mean_and_std(r)[0]["r_mean"] for r in by_encoder), strict=True))
        log({f"r_mean/{name}": value for name, value in means.items()}, step=iteration)
        tqdm.write("  mean on " + ", ".join(f"{name} {value:.1f}" for name, value in means.items()))
    log.media(iteration, texts={"Synthetic_Sentences": synset.captions}, histograms={"Pixels": synset.image_syn})
    if args.draw:
        with log.aside("the picture grid"):  # a font that is missing must not end the run
            grid = picture_grid(synset)
            with replacing(folder / f"synthetic_images_{iteration:06d}.png") as path:
                grid.save(path)
            log.media(iteration, pictures={"Synthetic_Images": grid})


if __name__ == "__main__":
    sys.exit(main())
