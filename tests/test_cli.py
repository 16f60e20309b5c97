"""Flags: booleans, compatibility, help, defaults of the demo, mistakes."""

import argparse
import errno
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import buffer
import coreset
import distill
import evaluate
from data.errors import InputError
from tests.programs import error_line
from utils import cli
from utils.cli.recipes import RECIPES, recipe_defaults
from utils.sets import SynSet, load_synset, save_synset

SCRIPTS = {"buffer": buffer, "distill": distill, "evaluate": evaluate, "coreset": coreset}
NEEDED = {"coreset": ["--method", "random"], "evaluate": ["--synset", "x"]}
RELEASED_BUFFER = """dataset num_experts train_epochs lr_teacher_img lr_teacher_txt mom l2 decay batch_size_train
    batch_size_test buffer_path image_root ann_root image_size image_encoder text_encoder image_pretrained
    text_pretrained image_trainable name"""
RELEASED_DISTILL = """dataset batch_size_test buffer_path image_root ann_root image_size image_encoder text_encoder
    image_pretrained text_pretrained image_trainable name lr_teacher_img lr_teacher_txt Iteration eval_it num_eval
    epoch_eval_train num_queries mini_batch_size syn_steps expert_epochs max_start_epoch lr_img lr_txt lr_lr batch_train
    pix_init txt_init draw std max_files max_experts no_aug save_dir"""


@pytest.fixture
def synset_file(tmp_path):
    pairs = torch.zeros(2, 3, 4, 4), torch.zeros(2, 5), 0.1, 0.2, ["a", "b"], (0.5,) * 3, (0.5,) * 3
    settings = {"dataset": "tiny", "image_encoder": "test_vit", "image_checkpoint": "weights", "image_size": 32}
    settings["method"] = "distilled"
    save_synset(tmp_path / "set.safetensors", SynSet(*pairs, {**settings, "num_eval": 2, "text_encoder": "demo"}))
    return str(tmp_path / "set.safetensors")


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        ([], True),
        (["--draw"], True),
        (["--draw", "True"], True),
        (["--draw=false"], False),
        (["--draw", "0"], False),
        (["--no_draw"], False),
        (["--draw", "--seed", "3"], True),
    ],
)
def test_booleans(argv, expected):
    assert distill.parse_args(argv).draw is expected


def test_booleans_that_are_off_by_default():
    assert buffer.parse_args([]).decay is False
    assert buffer.parse_args(["--decay"]).decay is True
    assert buffer.parse_args(["--no_decay"]).decay is False
    assert buffer.parse_args(["--no_aug"]).no_aug is True


def test_boolean_that_is_neither(capsys):
    line = error_line(capsys, distill.parse_args, ["--draw", "maybe"])
    assert "maybe" in line and "--draw" in line


def test_published_commands_parse():
    common = "--dataset=flickr --buffer_path=B --image_encoder=nfnet --text_encoder=bert --image_root=I --ann_root=A"
    args = buffer.parse_args(f"{common} --train_epochs=10 --num_experts=20 --image_size=224".split())
    assert (args.dataset, args.train_epochs, args.num_experts, args.image_size) == ("flickr", 10, 20, 224)
    more = "--syn_steps=8 --expert_epochs=1 --max_start_epoch=2 --lr_img=1000 --lr_txt=1000 --lr_lr=1e-02"
    args = distill.parse_args(f"{common} {more} --num_queries 100 --draw True --save_dir=S".split())
    assert (args.syn_steps, args.lr_img, args.lr_lr, args.num_queries, args.draw) == (8, 1000, 0.01, 100, True)
    assert (args.save_dir, args.buffer_path) == ("S", "B")


@pytest.mark.parametrize(("script", "names"), [(buffer, RELEASED_BUFFER), (distill, RELEASED_DISTILL)])
def test_live_flags_of_the_released_scripts_keep_their_names(script, names):
    assert not [name for name in names.split() if name not in vars(script.parse_args([]))]


@pytest.mark.parametrize("name", ["buffer", "distill"])
def test_unused_flags_are_one_warning_and_not_in_the_help(name, capsys):
    script = SCRIPTS[name]
    args = script.parse_args(["--zca", "True", "--dsa_strategy=color", "--distill", "--seed", "5"])
    assert args.seed == 5 and "zca" not in args
    (line,) = capsys.readouterr().out.splitlines()
    assert line == f"warning: without effect in {name}.py: --distill --dsa_strategy --zca"
    text = help_text(script, capsys)
    assert not [flag for flag in cli.UNUSED_FLAGS if flag in vars(args) or f"--{flag} " in text]


@pytest.mark.parametrize(
    ("name", "unused"),
    [
        ("buffer", ["batch_train"]),
        ("distill", ["batch_size_train", "num_workers"]),
        ("evaluate", ["batch_size_train", "num_workers"]),
        ("coreset", ["batch_train"]),
    ],
)
def test_flags_of_another_script_are_one_warning(name, unused, synset_file, capsys):
    """So that one set of flags can be given to all scripts."""
    needed = {**NEEDED, "evaluate": ["--synset", synset_file]}.get(name, [])
    given = [word for flag in cli.FLAGS_OF_OTHERS for word in (f"--{flag}", "3")]
    args = vars(SCRIPTS[name].parse_args([*needed, *given]))
    shown = " ".join(f"--{flag}" for flag in unused)
    assert capsys.readouterr().out == f"warning: without effect in {name}.py: {shown}\n"
    assert {flag: args.get(flag) for flag in cli.FLAGS_OF_OTHERS} == {
        flag: None if flag in unused else 3 for flag in cli.FLAGS_OF_OTHERS
    }


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("script", [buffer, distill])
def test_a_recipe_gives_no_flag_without_effect(script, recipe, capsys):
    script.parse_args(["--recipe", recipe])
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("name", SCRIPTS)
def test_no_warning_without_unused_flags(name, capsys, synset_file):
    needed = {**NEEDED, "evaluate": ["--synset", synset_file]}.get(name, [])
    for argv in (needed, [*needed, "--dataset", "demo"]):
        SCRIPTS[name].parse_args(argv)
        assert capsys.readouterr().out == ""


def help_text(script, capsys):
    with pytest.raises(SystemExit) as caught:
        script.parse_args(["--help"])
    assert caught.value.code == 0
    return capsys.readouterr().out


@pytest.fixture(params=SCRIPTS)
def helped(request, capsys, monkeypatch):
    """(its parser, what --help prints on 80 columns) of each script."""
    parsers = []
    init = cli.Parser.__init__
    monkeypatch.setattr(cli.Parser, "__init__", lambda self, **kwargs: parsers.append(self) or init(self, **kwargs))
    monkeypatch.setenv("COLUMNS", "80")
    text = help_text(SCRIPTS[request.param], capsys)
    return parsers[0], text


def visible(actions):
    return [action for action in actions if action.help != argparse.SUPPRESS]


def test_every_visible_flag_has_a_help_text(helped):
    parser, text = helped
    actions = visible(parser._actions)
    assert len(actions) > 15
    assert not [action.dest for action in actions if not action.help or len(action.help) < 8]
    assert all(f"--{action.dest}" in text for action in actions)


def test_every_flag_stands_under_a_title(helped):
    parser, text = helped
    groups = {group.title: visible(group._group_actions) for group in parser._action_groups}
    assert [action.dest for action in groups.pop("options")] == ["help"]
    shown = re.findall(r"^(\S.*):$", text, re.MULTILINE)
    assert shown == ["options", *(title for title in cli.TITLES if groups[title])]
    under_titles = [action for title in cli.TITLES for action in groups[title]]
    assert sorted(a.dest for a in under_titles) == sorted({a.dest for a in visible(parser._actions)} - {"help"})


def test_help_fits_80_columns_and_shows_what_must_be_given(helped):
    parser, text = helped
    assert max(map(len, text.splitlines())) <= 80
    usage = text.splitlines()[0]
    assert [action.dest for action in parser._actions if action.required] == re.findall(r" --([a-z]\w*)", usage)


@pytest.mark.parametrize("name", ["buffer", "coreset", "distill"])
def test_help_has_a_sentence_on_each_recipe(name, capsys):
    text = " ".join(help_text(SCRIPTS[name], capsys).split())
    assert not [recipe for recipe, content in RECIPES.items() if f"{recipe}, {content['help']}" not in text]


def test_experts_train_alike_in_both_scripts():
    """But a coreset's rates are those of its set too, where 0 would train nothing."""
    for_buffer, for_coreset = vars(buffer.parse_args([])), vars(coreset.parse_args(NEEDED["coreset"]))
    for name in ("train_epochs", "batch_size_train", "mom", "l2", "decay", "no_aug", "num_workers"):
        assert for_buffer[name] == for_coreset[name]
    assert buffer.parse_args(["--lr_teacher_img", "0"]).lr_teacher_img == 0


@pytest.mark.parametrize("name", SCRIPTS)
def test_unknown_flag_offers_the_nearest(name, capsys):
    line = error_line(capsys, SCRIPTS[name].parse_args, [*NEEDED.get(name, []), "--image_rot=I"])
    assert line.startswith(f"{name}.py: error:") and "--image_rot" in line and "--image_root" in line


def test_flags_are_not_abbreviated(capsys):
    assert "--num_exp" in error_line(capsys, buffer.parse_args, ["--num_exp", "3"])


def test_image_kwargs_are_python_values_as_json_keeps_them():
    argv = ["--image_kwargs", "a=1", "b=0.5", "c=(1, 2)", "d=name", "e=None"]
    assert buffer.parse_args(argv).image_kwargs == {"a": 1, "b": 0.5, "c": [1, 2], "d": "name", "e": None}
    assert buffer.parse_args([]).image_kwargs == {}


LORS = {
    **{"num_queries": 99, "mini_batch_size": 20, "batch_order": "permutation", "student_temperature": 0.07},
    **{"loss_type": "WBCE", "sim_type": "lowrank", "sim_rank": 10, "alpha": 3.0, "lr_img": 100.0, "lr_txt": 100.0},
    **{"lr_sim": 10.0, "epoch_eval_train": 100, "batch_train": 128},
}
HEADS = {"image_trainable": False, "only_has_image_projection": True}
FIT = {"lr_teacher_img": "fit", "lr_teacher_txt": "fit"}
EXPERTS_OF_HEADS = {"buffer": HEADS, "coreset": {"num_queries": 99, **HEADS}}
FAST = {"lr_img": 1000.0, "lr_txt": 1000.0}
# Every setting of every recipe, for the scripts that it changes.
SETTINGS = {
    "wu2024": {},
    "adam": {"distill": {"optimizer": "adam", "student_temperature": 0.07, "mini_batch_size": 25, **FIT}},
    "lors": {"coreset": {"num_queries": 99}, "distill": LORS},
    "heads": {
        **EXPERTS_OF_HEADS,
        "distill": {**LORS, **HEADS, **FIT, "segments": 4, "lr_img": 300.0, "lr_txt": 300.0, "ema_decay": 0.9},
    },
    "portable": {
        **{"buffer": HEADS, "coreset": HEADS},
        "distill": {
            **{**HEADS, "pix_param": "mixture", "pix_words": 1000, "pix_init": "kmeans", "segments": 2},
            **{"max_start_epoch": 1, "lr_teacher_img": 0.03, "lr_teacher_txt": 0.03},
            **{"optimizer": "adam", "lr_img": 0.005, "lr_txt": 0.1, "lr_lr": 0.05, "student_momentum": 0.9},
            **{"mini_batch_size": 20, "batch_order": "permutation", "student_temperature": 0.07, "ema_decay": 0.9},
            **{"Iteration": 150, "epoch_eval_train": 100, "batch_train": 128, "temperature": 0.14},
        },
    },
    "repblend": {**EXPERTS_OF_HEADS, "distill": {**LORS, **HEADS, "blend_alpha": 1.0}},
    "ptmst": {
        **EXPERTS_OF_HEADS,
        "distill": {**LORS, **HEADS, **FAST, "sim_type": "full", "ema_decay": 0.99, "shortcut": 5},
    },
    "demo": {
        "buffer": {
            **{**HEADS, "num_experts": 6, "train_epochs": 3, "mom": 0.9, "lr_teacher_img": 0.03, "lr_teacher_txt": 0.1},
        },
        "coreset": {**HEADS, "train_epochs": 3, "lr_teacher_img": 0.03, "lr_teacher_txt": 0.1},
        "distill": {
            **{**HEADS, "pix_param": "mixture", "pix_words": 1000, "pix_init": "kmeans", "segments": 1},
            **{"max_start_epoch": 1, "expert_epochs": 3, "lr_teacher_img": 0.03, "lr_teacher_txt": 0.1},
            **{"optimizer": "adam", "lr_img": 0.005, "lr_txt": 0.1, "lr_lr": 0.1, "student_momentum": 0.9},
            **{"mini_batch_size": 50, "batch_order": "permutation", "student_temperature": 0.14, "ema_decay": 0.97},
            **{"Iteration": 250, "epoch_eval_train": 100, "batch_train": 128, "temperature": 0.14},
            **{"syn_steps": 16, "eval_it": 125, "num_eval": 3},
        },
    },
    "demo_whole": {
        "buffer": {"no_aug": True, "num_experts": 2, "train_epochs": 3, "lr_teacher_img": 0.03, "lr_teacher_txt": 0.1},
        "coreset": {
            "no_aug": True,
            "train_epochs": 3,
            "lr_teacher_img": 0.03,
            "lr_teacher_txt": 0.1,
            "num_queries": 50,
        },
        "distill": {
            **{"no_aug": True, "lr_teacher_img": 0.03, "lr_teacher_txt": 0.03, "num_queries": 50, "lr_lr": 5e-4},
            **{"mini_batch_size": 25, "Iteration": 60, "eval_it": 20, "lr_img": 100.0, "lr_txt": 5.0, "num_eval": 3},
            "student_temperature": 0.07,
        },
    },
}


@pytest.mark.parametrize("name", ["buffer", "coreset", "distill"])
@pytest.mark.parametrize("recipe", SETTINGS)
def test_a_recipe_sets_what_it_names_and_nothing_else(name, recipe):
    assert SETTINGS.keys() == RECIPES.keys()
    argv, script = NEEDED.get(name, []), SCRIPTS[name]
    args, usual = (vars(script.parse_args([*argv, *more])) for more in (["--recipe", recipe], []))
    expected = SETTINGS[recipe].get(name, {})
    assert {key: args[key] for key in expected} == expected
    outer = (
        {"lr_img", "lr_txt", "lr_lr", "lr_sim"} if recipe in ("adam", "portable", "demo") else set()
    )  # those of the optimizer
    changed = {key for key in args if args[key] != usual[key]} - {"recipe"} - outer
    assert changed <= expected.keys()


def test_outer_rates_are_the_recipes_with_its_own_optimizer_alone():
    def rates(*argv):
        args = distill.parse_args(["--recipe", *argv])
        return [args.lr_img, args.lr_txt, args.lr_lr]

    assert rates("portable") == rates("portable", "--optimizer", "adam") == [0.005, 0.1, 0.05]
    assert rates("portable", "--optimizer", "sgd") == [1000, 1000, 0.01]
    assert rates("heads", "--optimizer", "sgd") == [300, 300, 0.01]
    assert rates("heads", "--optimizer", "adam") == rates("adam") == [0.03, 0.03, 0.02]


def test_a_recipes_setting_that_is_no_flag_is_an_error(monkeypatch):
    monkeypatch.setitem(RECIPES["heads"], "distill.py", {"segmens": 4})
    with pytest.raises(ValueError, match="segmens, which distill.py has no flag for"):
        distill.parse_args(["--recipe", "heads"])


def test_a_loss_of_the_students_is_not_that_of_the_experts():
    assert buffer.parse_args(["--recipe", "heads"]).loss_type == "InfoNCE"
    assert distill.parse_args(["--recipe", "heads"]).loss_type == "WBCE"


@pytest.mark.parametrize("name", ["buffer", "distill"])
def test_demo_changes_defaults_not_what_is_given(name):
    of_demo = recipe_defaults(f"{name}.py", "demo", None)
    for argv in (["--dataset", "demo"], ["--dataset=demo"]):
        args = SCRIPTS[name].parse_args(argv)
        assert {key: value for key, value in vars(args).items() if key in of_demo} == {
            key: value for key, value in of_demo.items() if key in vars(args)
        }
    args = SCRIPTS[name].parse_args(["--image_size", "32", "--dataset", "demo", "--text_pooling", "cls"])
    assert (args.image_size, args.text_pooling, args.text_encoder) == (32, "cls", "demo")
    assert SCRIPTS[name].parse_args([]).image_encoder == "nfnet"


@pytest.mark.parametrize("argv", [[], ["--dataset", "demo"], ["--recipe", "heads"]])
def test_defaults_work_together(argv):
    """Experts of the default length hold the snapshots, and the mini-batch fits."""
    experts, args = buffer.parse_args(argv), distill.parse_args(argv)
    assert args.max_start_epoch - 1 + args.expert_epochs <= experts.train_epochs
    assert args.mini_batch_size is None or args.mini_batch_size <= args.num_queries
    same = {key for key in vars(args) if key in vars(experts)} - {
        "name",
        "loss_type",
    }  # students of WBCE follow experts of InfoNCE
    same -= {"lr_teacher_img", "lr_teacher_txt", "temperature"} if argv else set()  # set apart on purpose
    assert {key: getattr(args, key) for key in same} == {key: getattr(experts, key) for key in same}


def test_evaluation_takes_its_defaults_from_the_set(synset_file):
    args = evaluate.parse_args(["--synset", synset_file])
    assert (args.dataset, args.image_size, args.num_eval, args.text_encoder) == ("tiny", 32, 2, "demo")
    assert args.image_encoder == ["test_vit"]
    argv = ["--synset", synset_file, "--image_encoder", "test_nfnet", "test_vit", "--num_eval", "7"]
    args = evaluate.parse_args(argv)
    assert args.num_eval == 7
    encoders = evaluate.encoder_args(args, [load_synset(synset_file)])
    assert {name: own.image_checkpoint for name, own in encoders.items()} == {"test_nfnet": None, "test_vit": "weights"}
    encoders = evaluate.encoder_args(evaluate.parse_args([*argv, "--image_checkpoint", "new", "none"]), [])
    assert [own.image_checkpoint for own in encoders.values()] == ["new", None]
    assert all(own.image_pretrained and own.image_trainable and own.image_kwargs == {} for own in encoders.values())


# ---- errors of a run


@pytest.mark.parametrize(
    ("error", "code", "start"),
    [
        (InputError("no such thing; do that"), 2, "error: no such thing; do that"),
        (torch.cuda.OutOfMemoryError("CUDA out of memory\nlong"), 2, "error: CUDA is out of memory; lower --batch"),
        (OSError(errno.ENOSPC, "No space left on device", "grid.png"), 2, "error: the disk is full"),
        (MemoryError(), 2, "error: the memory of this machine is full; lower --batch"),
        (RuntimeError("std::bad_alloc"), 2, "error: the memory of this machine is full"),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), 2, "error: the memory of this machine is full"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_errors_are_one_line(error, code, start, capsys):
    @cli.one_line_errors
    def main(argv=None):
        raise error

    assert main([]) == code
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(start)


def test_a_mistake_of_the_program_keeps_its_traceback():
    @cli.one_line_errors
    def main(argv=None):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        main([])


PRINTS_A_LOT = """
from utils import cli

@cli.one_line_errors
def main(argv=None):
    for number in range({}):
        print(number)

raise SystemExit(main())
"""


@pytest.mark.parametrize(
    ("program", "codes"),
    [
        (["coreset.py", "--help"], (0, 141)),  # argparse itself passes over what cannot be printed
        (["-c", PRINTS_A_LOT.format(10)], (141,)),
        (["-u", "-c", PRINTS_A_LOT.format(10000)], (141,)),
    ],
    ids=["help", "at the end", "unbuffered"],
)
def test_output_that_nobody_reads_ends_quietly(program, codes):
    reader, writer = os.pipe()
    os.close(reader)
    ended = subprocess.run(
        [sys.executable, *program], stdout=writer, stderr=subprocess.PIPE, cwd=Path(__file__).parents[1], timeout=240
    )
    os.close(writer)
    assert ended.stderr == b"" and ended.returncode in codes


def test_another_broken_pipe_is_no_quiet_end():
    @cli.one_line_errors
    def main(argv=None):
        raise BrokenPipeError(errno.EPIPE, "of a worker")

    with pytest.raises(BrokenPipeError):
        main()
