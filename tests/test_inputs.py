"""Over five hundred wrong inputs: each ends with exit code 2 and one line that names it, and leaves nothing behind."""

import json
import math
import os
import random
import shlex
import shutil
import stat
import struct
import zlib
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import buffer
import coreset
import distill
import evaluate
from data.annotations import read_split
from data.errors import InputError
from tests.conftest import ENCODER_WEIGHTS, QUICK_BUFFER, QUICK_DISTILL
from tests.programs import error_line
from utils.files import save_tensors
from utils.forms import Mixture, Sentences, as_words
from utils.sets import export_released, export_sets, load_synset, save_synset

SCRIPTS = {"buffer": buffer, "coreset": coreset, "distill": distill, "evaluate": evaluate}
QUICK = {
    "buffer": [*QUICK_BUFFER, "--num_experts", "1", "--buffer_path", "new"],
    "coreset": ["--method", "random", "--num_queries", "4", "--save_dir", "new"],
    "distill": [*QUICK_DISTILL, "--buffer_path", "buffer", "--save_dir", "new", "--Iteration", "1", "--no_report"],
    "evaluate": ["--num_eval", "1", "--epoch_eval_train", "1"],
}


@pytest.fixture(scope="module")
def whole(tiny_data, experts, run_distill, save_bert, tmp_path_factory):
    """A folder with one of everything that can be given: data, experts, a run, sets of every form, weights, words."""
    root = tmp_path_factory.mktemp("whole") / "all"
    shutil.copytree(tiny_data, root / "data")
    shutil.copytree(experts, root / "buffer")
    quick = "--eval_it", 1, "--num_eval", 1, "--epoch_eval_train", 1, "--no_draw"
    assert run_distill(root / "run", "--Iteration", 1, *quick) == 0
    shutil.rmtree(root / "run/wandb", ignore_errors=True)
    synset = load_synset(root / "run/last.safetensors")
    save_synset(root / "set.safetensors", synset)
    export_sets(root / "folder", {"set": synset})
    export_released(root / "set.pt", synset)
    pictures = torch.randint(0, 256, (9, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    mixture = replace(synset, mixture=Mixture(torch.rand(6, 9).half().float(), as_words(pictures)))
    save_synset(root / "mixture.safetensors", mixture)
    export_sets(root / "mixture", {"set": mixture})
    terms = Sentences(["a dog", "a cat"], torch.tensor([[0, 1]] * 6), torch.tensor([[0.7, 0.3]] * 6))
    save_synset(root / "sentences.safetensors", replace(synset, sentences=terms))
    export_sets(root / "sentences", {"set": replace(synset, sentences=terms)})
    (root / "captioned").mkdir()
    for i in range(6):
        shutil.copy(root / f"folder/{i:06d}.png", root / "captioned")
    lines = [json.dumps({"file_name": f"{i:06d}.png", "text": "a dog"}) for i in range(6)]
    (root / "captioned/metadata.jsonl").write_text("\n".join(lines))
    (root / "words.txt").write_text("a dog\na cat\n")
    (root / "words.json").write_text('["a dog", "a cat"]')
    shutil.copy(ENCODER_WEIGHTS, root / "weights.safetensors")
    torch.save(load_file(ENCODER_WEIGHTS), root / "weights.pt")
    save_bert(root / "own_bert")
    return root


@pytest.fixture
def here(whole, tmp_path, monkeypatch):
    """A copy of it to spoil, the current folder; the data's pictures, which are many, are links."""
    shutil.copytree(whole, tmp_path / "all", ignore=lambda folder, names: {"demo-images"} & set(names))
    shutil.copytree(whole / "data/demo-images", tmp_path / "all/data/demo-images", copy_function=os.link)
    monkeypatch.chdir(tmp_path / "all")
    return tmp_path / "all"


@pytest.fixture
def command(tiny_argv):
    """The command line of a script with all that it needs; what is given comes last, and counts."""
    data = [*tiny_argv, "--image_root", "data", "--ann_root", "data"]

    def make(script, argv):
        own = data
        if script == "evaluate":  # which takes encoders from the set
            own = [*data[data.index("--num_workers") + 2 :]]
            own += [] if "--synset" in argv else ["--synset", "set.safetensors"]
        return [*own, *QUICK[script], *shlex.split(argv)]

    return make


def tree(root):
    """Every file and folder, with size and time."""
    found = {}
    for path in root.rglob("*"):
        status = path.lstat()
        found[path.relative_to(root)] = None if stat.S_ISDIR(status.st_mode) else (status.st_size, status.st_mtime_ns)
    return found


def refused(script, argv, capsys):
    """The one line with which the script refuses `argv`; nothing is written."""
    before = tree(Path.cwd())
    line = error_line(capsys, SCRIPTS[script].main, argv)
    assert tree(Path.cwd()) == before
    return line


# ---- flags: a value of a wrong type or out of range, a name misspelt

FLAGS = {
    "buffer": """
        --num_experts 0 | --num_experts 2.5 | --num_experts many | --train_epochs 0 | --train_epochs -3
        --lr_teacher_img -1 | --lr_teacher_img nan | --lr_teacher_img inf | --lr_teacher_txt high | --mom 1 | --mom -0.1
        --l2 -1 | --l2 inf | --temperature 0 | --temperature inf | --image_kwargs novalue | --image_size 0
        --image_size 32px | --batch_size_train 0 | --batch_size_test 0 | --num_workers -1 | --seed -1
        --seed 4294967296 | --seed 99999999999999999999 | --split_seed -1 | --precision fp8 | --text_pooling max
        --loss_type infonce | --aug_views -1 | --keep_epochs 0 | --snapshot_type int8 | --recipe head | --decay maybe
        --lora_rank 0 | --lora_alpha 0 | --lora_train all | --image_trainable perhaps | --cache_images 2
        --num_exprts 3 | --num_exp 3 | --image_rot I
    """,
    "coreset": """
        --method best | --num_queries 0 | --num_queries few | --features both | --lr_teacher_txt 0
        --lr_teacher_img inf | --seed 1e3 | --draw 3 | --recipe ptm | --metod random
    """,
    "distill": """
        --Iteration -1 | --Iteration 1.5 | --num_queries many | --pix_init fake | --txt_init fake | --lr_teacher_img 0
        --lr_teacher_txt fits | --lr_img -1 | --lr_txt nan | --lr_img inf | --lr_lr inf | --lr_sim x | --syn_steps 0
        --mini_batch_size 0 | --expert_epochs 0 | --max_start_epoch 0 | --shortcut 0 | --max_files 0 | --max_experts 0
        --student_momentum 1 | --student_temperature 0 | --blend_alpha -1 | --syn_aug spin | --syn_views -1
        --encoders_per_step 0 | --segments 0 | --optimizer lion | --ema_decay 1 | --adjoint_decay 1.1 | --pix_param jpeg
        --pix_limit 0 | --pix_words 0 | --pix_quality 96 | --txt_param words | --txt_terms 0 | --sim_type diagonal
        --sim_rank 0 | --alpha 0 | --phases 0 | --batch_order sorted | --eval_it 0 | --pair_chunk 0 | --num_eval 0
        --epoch_eval_train 0 | --batch_train 0 | --eval_views -1 | --iteration 5
    """,
    "evaluate": """
        --syn_lr_img 0 | --syn_lr_txt inf | --loss_type WCE | --texts real | --grid_img 0 | --grid_txt a | --looks -1
        --tune_rates 5 | --num_eval none | --sysnet s
    """,
}
WRONG_FLAGS = [(script, pair.strip()) for script in FLAGS for pair in FLAGS[script].replace("\n", "|").split("|")]


@pytest.mark.parametrize(("script", "pair"), [case for case in WRONG_FLAGS if case[1]])
def test_a_flag_with_a_wrong_value_or_name(script, pair, whole, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    needed = {"coreset": ["--method", "random"], "evaluate": ["--synset", str(whole / "set.safetensors")]}
    line = refused(script, [*needed.get(script, []), *pair.split()], capsys)
    flag, value = pair.split()
    assert line.startswith(f"{script}.py: error: ") and flag in line and (value in line or "did you mean" in line)


# ---- flags that do not go together, or not with what is there

TOGETHER = {
    "buffer": [
        ("--lora_alpha 8", "--lora_alpha --lora_rank"),
        ("--lora_rank 2 --lora_layers '('", "--lora_layers regular"),
        ("--lora_rank 2 --lora_layers nowhere", "--lora_layers nowhere"),
        ("--keep_epochs 5 --train_epochs 2", "--keep_epochs 5 --train_epochs 2"),
        ("--image_encoder test_nfnet test_nfnet", "--image_encoder test_nfnet once"),
        ("--image_encoder test_nfnet test_vit", "--image_trainable"),
        ("--aug_views 2", "--aug_views --image_trainable"),
        ("--cache_images --image_trainable False", "--cache_images frozen"),
        ("--image_encoder nfnett", "nfnett nfnet"),
        ("--image_encoder torchvision:resnet19", "resnet19 torchvision:resnet18"),
        ("--image_kwargs nothing=1", "test_nfnet nothing --image_kwargs"),
        ("--image_size 3", "--image_size 3"),
        ("--text_encoder nowhere/none", "nowhere/none"),
        ("--device cuda:99", "--device cuda:99"),
        ("--device meta", "--device meta"),
        ("--device cpu:x", "--device cpu:x"),
        ("--dataset other", "'other' data --ann_root"),
        ("--train_epochs 3 --buffer_path buffer --num_experts 2", "expert_000 train_epochs=2 train_epochs=3"),
        ("--seed 7 --buffer_path buffer --num_experts 2", "expert_000 seed=0 seed=7"),
        ("--loss_type SigLIP --buffer_path buffer --num_experts 2", "expert_000 loss_type=InfoNCE SigLIP"),
    ],
    "coreset": [
        ("--output set.pt", "--output set.pt .safetensors"),
        ("--method forgetting --train_epochs 1", "forgetting --train_epochs"),
        ("--method forgetting --batch_size_train 1", "forgetting --batch_size_train"),
        ("--method kmeans --no_image_pretrained --image_checkpoint none", "--features joint --image_checkpoint"),
        ("--num_queries 25", "25 24 --num_queries"),
        ("--image_encoder test_nfnet test_vit", "--image_checkpoint 2"),
    ],
    "distill": [
        ("--image_only --text_only", "--image_only --text_only"),
        ("--init_set set.safetensors --pix_init kmeans", "--init_set kmeans"),
        ("--image_only --txt_init noise", "noise"),
        ("--text_only --pix_init noise", "noise"),
        ("--syn_aug --text_only", "--syn_aug --text_only --syn_views"),
        ("--pix_limit 0.1 --text_only", "--pix_limit --text_only"),
        ("--pix_param pyramid --text_only", "pyramid --text_only"),
        ("--syn_views 2", "--syn_views --syn_aug"),
        ("--sim_type full", "InfoNCE NCE"),
        ("--blend_alpha 1", "--blend_alpha --image_trainable"),
        ("--phases 7", "--phases 7 6"),
        ("--encoders_per_step 2", "--encoders_per_step 2 1"),
        ("--pix_param mixture", "mixture --image_trainable"),
        ("--pix_param mixture --image_trainable False --pix_init noise", "mixture noise"),
        ("--pix_param mixture --image_trainable False --pix_words 5", "--pix_words 5 6"),
        ("--txt_param mixture --image_only", "mixture --image_only"),
        ("--txt_param mixture --txt_init noise", "mixture noise"),
        ("--txt_words words.txt", "--txt_words --txt_param"),
        ("--save_dir run", "run --resume"),
        ("--resume", "new --save_dir"),
        ("--save_dir run --resume --eval_it 1 --num_eval 1 --epoch_eval_train 1 --Iteration 0", "1 --Iteration"),
        ("--save_dir run --resume --lr_img 7", "state.safetensors lr_img=10"),
        ("--num_queries 25", "25 24"),
        ("--max_start_epoch 3", "--max_start_epoch 3 2"),
        ("--expert_epochs 3", "--expert_epochs 3"),
        ("--shortcut 1", "--shortcut 1"),
        ("--image_encoder test_vit --image_checkpoint none", "--image_checkpoint test_vit"),
        ("--text_pooling cls", "text_pooling=mean text_pooling=cls"),
        ("--image_size 64", "image_size=32 image_size=64"),
        ("--lora_rank 2", "--lora_layers attn"),
        ("--image_trainable False", "image_trainable=True"),
        ("--loss_type SigLIP", "InfoNCE SigLIP"),
        ("--buffer_path nowhere", "--buffer_path nowhere"),
        ("--init_set set.safetensors --num_queries 4", "set.safetensors 6 4"),
        ("--init_set set.safetensors --txt_param mixture --txt_words nowhere.txt", "nowhere.txt"),
        ("--init_set mixture.safetensors", "mixture.safetensors mixtures"),
        ("--init_set captioned", "captioned embeddings"),
        ("--coreset nowhere.safetensors --report", "nowhere.safetensors"),
    ],
    "evaluate": [
        ("--export new --tune_rates", "--export --tune_rates"),
        ("--export new --texts nearest", "--export --texts"),
        ("--license MIT", "--license MIT"),
        ("--license mit", "--license --export"),
        ("--export run --json t.json", "run holds"),
        ("--export_pt new.pt --json t.json", "--export_pt --json"),
        ("--export_pt new.safetensors", "--export_pt .pt"),
        ("--export new --export_pt new.pt", "--export_pt --export"),
        ("--synset set.safetensors run/best.safetensors --export_pt new.pt", "--export_pt one"),
        ("--synset set.safetensors run/best.safetensors folder --export run", "run"),
        ("--synset set.safetensors folder/../set.safetensors --export new", "--export"),
        ("--synset captioned --export new", "captioned embeddings"),
        ("--synset mixture.safetensors --export_pt new.pt", "new.pt mixtures"),
        ("--export data", "data"),
        ("--export words.txt", "words.txt"),
        ("--export_pt words.txt/new.pt", "words.txt/new.pt"),
        ("--looks 2", "--looks 2"),
        ("--map_captions words.txt --texts nearest", "--map_captions --texts"),
        ("--dataset other", "set.safetensors dataset=tiny dataset=other"),
        ("--split_seed 5", "set.safetensors split_seed=0 split_seed=5"),
        ("--markdown data", "data"),
        ("--json words.txt/t.json", "words.txt/t.json"),
        ("--report folder", "folder"),
        ("--markdown new --json ./new", "--markdown --json new"),
        ("--synset captioned --dataset tiny", "captioned --syn_lr_img --syn_lr_txt"),
        ("--synset set.pt --dataset tiny --texts nearest", "set.pt captions"),
        ("--text_encoder nowhere/none", "nowhere/none"),
        ("--image_encoder test_nfnett", "test_nfnett test_nfnet"),
        ("--image_encoder test_nfnet test_vit --image_checkpoint weights.pt", "--image_checkpoint"),
        ("--all_data nowhere", "nowhere"),
        ("--all_data buffer --image_size 64", "image_size=32 image_size=64"),
        ("--synset run", "run best.safetensors"),
        ("--synset data", "data set.json"),
        ("--lora_layers all", "--lora_layers --lora_rank"),
    ],
}


@pytest.mark.parametrize(("script", "argv", "words"), [(s, *case) for s, cases in TOGETHER.items() for case in cases])
def test_flags_that_do_not_go_together(script, argv, words, whole, command, monkeypatch, capsys):
    monkeypatch.chdir(whole)
    line = refused(script, command(script, argv), capsys)
    assert all(word in line for word in words.split()), line


# ---- files: missing, empty, cut short, of another kind, a folder, unreadable


def empty(path):
    path.write_bytes(b"")


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def noise(path):
    path.write_bytes(bytes(range(256)) * 8)


def missing(path):
    path.unlink()


def folder(path):
    path.unlink()
    path.mkdir()


def unreadable(path):
    """A socket: unlike a file without permissions, it cannot be read by root either."""
    path.unlink()
    os.mknod(path, stat.S_IFSOCK | 0o600)


def another_kind(path):
    """A whole file of another program."""
    path.unlink()
    save_file({"a": torch.ones(1)}, path)


DAMAGES = empty, cut, noise, missing, folder, unreadable, another_kind
EXPERT = "buffer/tiny/test_nfnet/demo/expert_000.safetensors"
# What is spoilt, who reads it, with which flags.
FILES = {
    "set.safetensors": ("evaluate", ""),
    "run/state.safetensors": ("distill", "--save_dir run --resume --Iteration 3"),
    "set.pt": ("evaluate", "--synset set.pt --dataset tiny --ann_root data --image_root data"),
    "folder/set.json": ("evaluate", "--synset folder"),
    "folder/metadata.jsonl": ("evaluate", "--synset folder"),
    "folder/texts.safetensors": ("evaluate", "--synset folder"),
    "folder/000002.png": ("evaluate", "--synset folder"),
    "mixture/words/000007.jpg": ("evaluate", "--synset mixture"),
    "captioned/metadata.jsonl": ("evaluate", "--synset captioned --syn_lr_img 0.1 --syn_lr_txt 0.1"),
    "captioned/000003.png": ("evaluate", "--synset captioned --syn_lr_img 0.1 --syn_lr_txt 0.1"),
    EXPERT: ("distill", ""),
    "data/tiny_train.json": ("buffer", ""),
    "data/tiny_test.json": ("evaluate", ""),
    "weights.safetensors": ("buffer", "--image_checkpoint weights.safetensors"),
    "weights.pt": ("coreset", "--image_checkpoint weights.pt"),
    "words.txt": ("distill", "--txt_param mixture --txt_words words.txt"),
    "words.json": (
        "evaluate",
        "--text_encoder own_bert --text_pooling cls --text_pretrained True --map_captions words.json",
    ),
    "own_bert/config.json": ("coreset", "--text_encoder own_bert"),
    "own_bert/model.safetensors": ("coreset", "--text_encoder own_bert"),
}
HARMLESS = {(EXPERT, missing)}  # the other one is enough


@pytest.mark.parametrize(
    ("name", "damage"), [(name, damage) for name in FILES for damage in DAMAGES if (name, damage) not in HARMLESS]
)
def test_a_damaged_file(name, damage, here, command, capsys):
    damage(here / name)
    script, argv = FILES[name]
    line = refused(script, command(script, argv), capsys)
    known = [name, Path(name).name, *map(str, Path(name).parents[:-1])]  # of a folder, or a file in it
    assert any(place in line for place in known), line


# ---- files with a part missing, of another type or shape, or not finite


def metadata(name, **changes):
    """Changes the metadata of a safetensors file; None takes a key out."""

    def spoil():
        stored = load_file(name)
        with safe_open(name, "pt") as handle:
            kept = {key: json.loads(value) for key, value in handle.metadata().items()} | changes
        Path(name).unlink()
        save_tensors(name, stored, {key: value for key, value in kept.items() if value is not None})

    return spoil


def settings(name="set.safetensors", **changes):
    """Changes settings of a set; None takes one out."""

    def spoil():
        with safe_open(name, "pt") as handle:
            kept = json.loads(handle.metadata()["settings"]) | changes
        metadata(name, settings={key: value for key, value in kept.items() if value is not None})()

    return spoil


def tensors(name, **changes):
    """Changes tensors of a safetensors file, by a function of the tensor or to another one; None takes one out."""

    def spoil():
        stored = load_file(name)
        with safe_open(name, "pt") as handle:
            kept = handle.metadata()
        for key, change in changes.items():
            stored[key] = change(stored[key]) if callable(change) else change
        Path(name).unlink()
        save_file({key: value.contiguous() for key, value in stored.items() if value is not None}, name, kept)

    return spoil


def torch_file(name, **changes):
    """Changes parts of a torch file, as `tensors`."""

    def spoil():
        stored = torch.load(name, weights_only=True)
        for key, change in changes.items():
            stored[key] = change(stored[key]) if callable(change) else change
        torch.save({key: value for key, value in stored.items() if value is not None}, name)

    return spoil


def claims(name, side):
    """A PNG file of few bytes whose head claims so many pixels a side."""

    def spoil():
        head = b"IHDR" + struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
        parts = head, b"IDAT" + zlib.compress(b"\0" * 100), b"IEND"
        chunks = [struct.pack(">I", len(part) - 4) + part + struct.pack(">I", zlib.crc32(part)) for part in parts]
        Path(name).unlink()
        Path(name).write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(chunks))

    return spoil


def code(name):
    """Lets the configuration of a text encoder name code of its own, which would leave a file behind."""

    def spoil():
        Path(name, "evil.py").write_text("open('it_ran', 'w').close()")
        config = {"model_type": "evil", "auto_map": {"AutoConfig": "evil.Config", "AutoModel": "evil.Model"}}
        Path(name, "config.json").write_text(json.dumps(config))

    return spoil


def text(name, content):
    return lambda: Path(name).write_text(content, encoding="utf-8")


def row(name, number=0, **changes):
    """Changes a row of a JSON list, or a line of a file of such; None takes a key out."""

    def spoil():
        path = Path(name)
        lines = path.suffix == ".jsonl"
        rows = [json.loads(line) for line in path.read_text().splitlines()] if lines else json.loads(path.read_text())
        rows[number] = {k: v for k, v in {**rows[number], **changes}.items() if v is not None}
        path.write_text("\n".join(map(json.dumps, rows)) if lines else json.dumps(rows))

    return spoil


def about(part=None, **changes):
    """Changes a part of set.json; None takes a key out."""

    def spoil():
        path = Path("folder/set.json")
        stored = json.loads(path.read_text())
        inner = stored[part] if part else stored
        inner |= changes
        for key in [key for key, value in changes.items() if value is None]:
            del inner[key]
        path.write_text(json.dumps(stored))

    return spoil


def with_nan(tensor):
    tensor = tensor.clone().float()
    tensor.view(-1)[0] = math.nan
    return tensor


DEEP = "[" * 100_000
LONG = "1" * 5000  # digits of a number: more than Python reads
HALF = "a \ud800 dog"  # half a character, as only JSON can write it
FOLDER, CAPTIONED, MIXTURE = (
    "--synset folder",
    "--synset captioned --syn_lr_img 0.1 --syn_lr_txt 0.1",
    "--synset mixture",
)
RELEASED = "--synset set.pt --dataset tiny --ann_root data --image_root data"
RESUME = "--save_dir run --resume --Iteration 3 --eval_it 1 --num_eval 1 --epoch_eval_train 1 --no_draw"
STATE, SET, MIXED, SUMS = "run/state.safetensors", "set.safetensors", "mixture.safetensors", "sentences.safetensors"
WEIGHT = "0/text_projection.projection.weight"
LATER = "2/text_projection.projection.weight"

PARTS = {
    "evaluate": [
        # sets
        *((metadata(SET, **{key: None}), "", f"{SET} lacks {key}") for key in ("captions", "mean", "std", "settings")),
        *((tensors(SET, **{key: None}), "", f"{SET} {key}") for key in ("image_syn", "text_syn", "syn_lr_img")),
        (tensors(SET, image_syn=lambda t: t[0]), "", f"{SET} image_syn [3,"),
        (tensors(SET, image_syn=lambda t: t[:, :1]), "", f"{SET} image_syn [6, 1,"),
        (tensors(SET, image_syn=lambda t: (t * 0).byte()), "", f"{SET} image_syn uint8"),
        (tensors(SET, image_syn=lambda t: t.to(torch.complex64)), "", f"{SET} image_syn complex64"),
        (tensors(SET, image_syn=lambda t: t.to(torch.float8_e4m3fn)), "", f"{SET} image_syn float8"),
        (tensors(SET, image_syn=with_nan), "", f"{SET} image_syn finite"),
        (tensors(SET, text_syn=lambda t: t[:4]), "", f"{SET} 6 pictures, 4 texts"),
        (tensors(SET, text_syn=lambda t: t[0]), "", f"{SET} text_syn"),
        (tensors(SET, text_syn=lambda t: t[:, :7]), "", f"{SET} width 7"),
        (tensors(SET, text_syn=lambda t: t / 0), "", f"{SET} text_syn finite"),
        (tensors(SET, syn_lr_img=torch.tensor(0.0)), "", f"{SET} syn_lr_img 0.0"),
        (tensors(SET, syn_lr_txt=torch.tensor([0.1, 0.1])), "", f"{SET} syn_lr_txt"),
        (tensors(SET, syn_lr_txt=torch.tensor(math.nan)), "", f"{SET} syn_lr_txt nan"),
        (tensors(SET, similarity=torch.eye(5)), "", f"{SET} similarity"),
        (metadata(SET, captions=3), "", f"{SET} captions"),
        (metadata(SET, captions=["a"] * 5), "", f"{SET} 5 captions"),
        (metadata(SET, captions=[HALF] * 6), "", f"{SET} captions"),
        (metadata(SET, mean=[0.5, 0.5]), "", f"{SET} mean"),
        (metadata(SET, std=[0.5, 0.5, 0]), "", f"{SET} std"),
        (metadata(SET, files="a.jpg"), "", f"{SET} files"),
        (metadata(SET, scores=["high"]), "", f"{SET} scores"),
        (metadata(SET, alpha="x"), "", f"{SET} alpha"),
        (metadata(SET, loss_type="x"), "", f"{SET} loss_type"),
        (metadata(SET, loss_type=["NCE"]), "", f"{SET} loss_type"),
        (metadata(SET, phases=0), "", f"{SET} phases"),
        (metadata(SET, rates=[1]), "", f"{SET} rates"),
        (metadata(SET, rates={"test_nfnet": [0.1]}), "", f"{SET} rates"),
        (metadata(SET, rates={"test_nfnet": [0.1, -1]}), "", f"{SET} rates"),
        (metadata(SET, settings=[1]), "", f"{SET} settings"),
        (metadata(SET, kind="trajectory"), "", f"{SET} trajectory"),
        *((settings(**{key: None}), "", f"{SET} lacks {key}") for key in ("method", "dataset", "text_encoder")),
        (settings(method=3), "", f"{SET} method"),
        (settings(method="\x1b[2J"), "", f"{SET} method"),
        (settings(dataset=["tiny"]), "", f"{SET} dataset"),
        (settings(image_encoder=3), "", f"{SET} image_encoder"),
        (settings(image_encoder=[]), "", f"{SET} image_encoder"),
        (settings(text_encoder=None, text_pooling="max"), "", f"{SET} text_encoder"),
        (settings(text_pooling="max"), "", f"{SET} text_pooling max"),
        (settings(num_eval=-1), "--epoch_eval_train 1", f"{SET} num_eval -1"),
        (settings(epoch_eval_train="many"), "", f"{SET} epoch_eval_train many"),
        (settings(temperature=0), "", f"{SET} temperature 0"),
        (settings(batch_train=1.5), "", f"{SET} batch_train 1.5"),
        (settings(image_size="big"), "", f"{SET} image_size big"),
        (settings(image_kwargs=[1]), "", f"{SET} image_kwargs"),
        (settings(image_kwargs={"checkpoint_path": "/x"}), "", f"{SET} image_kwargs checkpoint_path"),
        (settings(image_kwargs={"x:pretrained_cfg_overlay": {"file": "/x"}}), "", f"{SET} image_kwargs x:pretrained"),
        (settings(image_trainable="maybe"), "", f"{SET} image_trainable maybe"),
        (settings(image_checkpoint=7), "", f"{SET} image_checkpoint 7"),
        (settings(lora_rank="two"), "", f"{SET} lora_rank two"),
        (settings(seed=-1), "", f"{SET} seed -1"),
        (settings(left_out=3), "", f"{SET} left_out"),
        (tensors(MIXED, pix_weights=with_nan), f"--synset {MIXED}", MIXED),
        (tensors(MIXED, pix_weights=lambda t: t[:, :5]), f"--synset {MIXED}", MIXED),
        (tensors(MIXED, pix_words=lambda t: t[:-9]), f"--synset {MIXED}", MIXED),
        (tensors(MIXED, pix_words=lambda t: t * 0), f"--synset {MIXED}", f"{MIXED} picture 0"),
        (tensors(MIXED, pix_sizes=lambda t: -t), f"--synset {MIXED}", MIXED),
        (tensors(MIXED, pix_sizes=None), f"--synset {MIXED}", MIXED),
        (tensors(SUMS, txt_rows=lambda t: t + 5), f"--synset {SUMS}", f"{SUMS} sentences"),
        (tensors(SUMS, txt_weights=with_nan), f"--synset {SUMS}", f"{SUMS} finite"),
        (tensors(SUMS, txt_rows=None), f"--synset {SUMS}", f"{SUMS} sentences"),
        (metadata(SUMS, sentences=[1, 2]), f"--synset {SUMS}", f"{SUMS} sentences"),
        # files of other programs
        (torch_file("set.pt", image=None), RELEASED, "set.pt image"),
        (torch_file("set.pt", image=[1]), RELEASED, "set.pt image"),
        (torch_file("set.pt", image=with_nan), RELEASED, "set.pt finite"),
        (torch_file("set.pt", text=lambda t: t[:2]), RELEASED, "set.pt 2 texts"),
        (torch_file("set.pt", text=lambda t: t.to_sparse()), RELEASED, "set.pt text"),
        (torch_file("set.pt", image=torch.zeros(1).expand(6, 3, 10**6, 10**6)), RELEASED, "set.pt image"),
        (torch_file("set.pt", image=torch.zeros(6, 3, 9, 9, device="meta")), RELEASED, "set.pt image"),
        (torch_file("set.pt", similarity_mat=torch.eye(5)), RELEASED, "set.pt similarity"),
        (torch_file("set.pt", similarity_params=3), RELEASED, "set.pt similarity"),
        (torch_file("set.pt", syn_lr_img=torch.zeros(3)), RELEASED, "set.pt syn_lr_img"),
        (lambda: torch.save([1], "set.pt"), RELEASED, "set.pt list"),
        (lambda: torch.save({"image": Path("x")}, "set.pt"), RELEASED, "set.pt code"),
        # folders
        (row("folder/metadata.jsonl", file_name="../folder/000001.png"), FOLDER, "metadata.jsonl ../folder"),
        (row("folder/metadata.jsonl", file_name="/etc/passwd"), FOLDER, "metadata.jsonl /etc/passwd"),
        (row("folder/metadata.jsonl", file_name=None), FOLDER, "metadata.jsonl file_name"),
        (row("folder/metadata.jsonl", file_name="x\0.png"), FOLDER, "metadata.jsonl"),
        (row("folder/metadata.jsonl", file_name="x" * 300), FOLDER, "metadata.jsonl"),
        (row("folder/metadata.jsonl", text=3), FOLDER, "metadata.jsonl text"),
        (row("folder/metadata.jsonl", text=HALF), FOLDER, "folder captions"),
        (row("folder/metadata.jsonl", sentences=["a"], weights=[1]), FOLDER, "metadata.jsonl pair 2"),
        (row("sentences/metadata.jsonl", weights=["a", "b"]), "--synset sentences", "metadata.jsonl pair 1"),
        (row("sentences/metadata.jsonl", weights=[math.nan, 1]), "--synset sentences", "metadata.jsonl pair 1"),
        (text("folder/metadata.jsonl", DEEP), FOLDER, "metadata.jsonl"),
        (text("folder/set.json", DEEP), FOLDER, "set.json"),
        (text("folder/set.json", LONG), FOLDER, "set.json"),
        (about(training=None), FOLDER, "set.json training"),
        (about(kind="x"), FOLDER, "set.json"),
        (about(files=3), FOLDER, "folder files"),
        (about(scores=3), FOLDER, "folder scores"),
        (about("training", syn_lr_img=None), FOLDER, "set.json syn_lr_img"),
        (about("training", syn_lr_img="high"), FOLDER, "set.json syn_lr_img high"),
        (about("training", syn_lr_img=10**400), FOLDER, "folder"),
        (about("training", mean=[0.5, 0.5, math.nan]), FOLDER, "folder mean"),
        (about("training", rates={"a": 3}), FOLDER, "set.json rates"),
        (about("training", phases=7), FOLDER, "phases 7"),
        (about("training", epochs=0), FOLDER, "folder epoch_eval_train 0"),
        (about("training", batch_size="all"), FOLDER, "folder batch_train all"),
        (about("settings", seed="x"), FOLDER, "folder seed 'x'"),
        (tensors("folder/texts.safetensors", text_syn=lambda t: t[:3]), FOLDER, "metadata.jsonl 6 3"),
        (tensors("folder/texts.safetensors", text_syn=with_nan), FOLDER, "folder text_syn finite"),
        (lambda: Image.new("RGB", (5, 4)).save("folder/000001.png"), FOLDER, "000001.png 5 x 4"),
        (claims("folder/000000.png", 11_000), FOLDER, "000000.png pixels"),
        (claims("folder/000001.png", 20_000), FOLDER, "000001.png pixels"),
        (claims("captioned/000000.png", 14_000), CAPTIONED, "000000.png pixels"),
        (claims("mixture/words/000002.jpg", 10_000), MIXTURE, "mixture picture 2 pixels"),
        (claims("data/demo-images/test_00000.png", 14_000), "", "test_00000.png pixels --skip_broken"),
        (lambda: Path("mixture/words/000008.jpg").unlink(), MIXTURE, "000008.jpg"),
        (
            row("captioned/metadata.jsonl", file_name="../captioned/000001.png"),
            CAPTIONED,
            "metadata.jsonl ../captioned",
        ),
        (row("captioned/metadata.jsonl", text=HALF), CAPTIONED, "captioned captions"),
        (text("captioned/metadata.jsonl", "[]"), CAPTIONED, "metadata.jsonl pair 1"),
        # the rest
        (row("data/tiny_test.json", caption=HALF), "", "tiny_test.json row 1"),
        (
            text("words.json", "[1]"),
            "--text_encoder own_bert --text_pooling cls --text_pretrained True --map_captions words.json",
            "words.json",
        ),
        (
            text("words.json", DEEP),
            "--text_encoder own_bert --text_pooling cls --text_pretrained True --map_captions words.json",
            "words.json",
        ),
        (settings(text_encoder="nowhere/none"), "--text_encoder demo --text_pooling mean", "set.safetensors nowhere"),
    ],
    "distill": [
        *(
            (metadata(STATE, **{key: None}), RESUME, f"{STATE} lacks {key}")
            for key in ("settings", "iteration", "best")
        ),
        (tensors(STATE, text_syn=None), RESUME, f"{STATE} lacks text_syn"),
        (tensors(STATE, image_syn=lambda t: t[:3]), RESUME, f"{STATE} image_syn"),
        (tensors(STATE, image_syn=with_nan), RESUME, f"{STATE} image_syn finite"),
        (tensors(STATE, **{"momentum/image_syn": lambda t: t[:3]}), RESUME, f"{STATE} image_syn"),
        (tensors(STATE, **{"momentum/nothing": torch.ones(1)}), RESUME, f"{STATE} nothing"),
        (metadata(STATE, iteration="x"), RESUME, f"{STATE} iteration"),
        (metadata(STATE, iteration=-1), RESUME, f"{STATE} iteration"),
        (metadata(STATE, best="x"), RESUME, f"{STATE} best"),
        (metadata(STATE, guard=[1]), RESUME, f"{STATE} guard"),
        (metadata(STATE, settings=[1]), RESUME, f"{STATE} settings"),
        (metadata(EXPERT, settings=None), "", "expert_000.safetensors lacks settings"),
        (metadata(EXPERT, settings=[1]), "", "expert_000.safetensors settings"),
        (metadata(EXPERT, recalls=None), "", "expert_000.safetensors lacks recalls"),
        (metadata(EXPERT, recalls={"a": 1}), "", "expert_000.safetensors recalls"),
        (metadata(EXPERT, scales=[1]), "", "expert_000.safetensors scales"),
        (metadata(EXPERT, scales={LATER: "x"}), "", "expert_000.safetensors scales"),
        (metadata(EXPERT, start=3), "", "expert_000.safetensors start"),
        (metadata(EXPERT, start="0" * 64), "", "expert_000.safetensors start_0"),
        (tensors(EXPERT, **{"first/x": torch.ones(1)}), "", "expert_000.safetensors first/x"),
        (tensors(EXPERT, **{WEIGHT: None}), "", "expert_000.safetensors text_projection"),
        (tensors(EXPERT, **{LATER: None}), "--max_start_epoch 2", "expert_000.safetensors text_projection"),
        (tensors(EXPERT, **{LATER: lambda t: t[:2]}), "", "expert_000.safetensors text_projection"),
        (tensors(EXPERT, **{WEIGHT: lambda t: t[:2]}), "", "expert_000.safetensors text_projection"),
        (tensors(EXPERT, **{WEIGHT: lambda t: t.long()}), "", "expert_000.safetensors I64"),
        (text("words.txt", "\n \n"), "--txt_param mixture --txt_words words.txt", "words.txt sentence"),
        (text("words.json", '{"a": 1}'), "--txt_param mixture --txt_words words.json", "words.json list"),
        (text("words.json", LONG), "--txt_param mixture --txt_words words.json", "words.json"),
    ],
    "buffer": [
        (metadata(EXPERT, settings=[1]), "--buffer_path buffer --num_experts 2", "expert_000.safetensors settings"),
        (tensors(EXPERT, **{"x": torch.ones(1)}), "--buffer_path buffer --num_experts 2", "expert_000.safetensors"),
        *(
            (row("data/tiny_train.json", **change), "", f"tiny_train.json row 1 {word}")
            for change, word in (
                ({"image": None}, "image"),
                ({"image": 3}, "image"),
                ({"image": ""}, "image"),
                ({"caption": None}, "caption"),
                ({"caption": 3}, "caption"),
                ({"caption": [3]}, "caption"),
                ({"caption": []}, "caption"),
                ({"caption": HALF}, "caption"),
            )
        ),
        (row("data/tiny_train.json", image="nowhere.png"), "", "nowhere.png --image_root"),
        (row("data/tiny_train.json", image="x\0.png"), "", "pictures are missing --image_root"),
        (row("data/tiny_train.json", image="x" * 300), "", "pictures are missing --image_root"),
        (text("data/tiny_train.json", "{}"), "", "tiny_train.json list"),
        (text("data/tiny_train.json", "[]"), "", "tiny_train.json no rows"),
        (text("data/tiny_train.json", "[3]"), "", "tiny_train.json row 1"),
        (text("data/tiny_train.json", DEEP), "", "tiny_train.json"),
        (text("data/tiny_train.json", f"[{LONG}]"), "", "tiny_train.json"),
        (lambda: Path("data/tiny_train.json").rename("data/tiny.csv").write_text("a,b\n1,2\n"), "", "tiny.csv"),
        (
            tensors("weights.safetensors", **{"stem.conv1.weight": None}),
            "--image_checkpoint weights.safetensors",
            "stem",
        ),
        (
            tensors("weights.safetensors", **{"stem.conv1.weight": with_nan}),
            "--image_checkpoint weights.safetensors",
            "weights.safetensors stem.conv1.weight finite",
        ),
        (torch_file("weights.pt", **{"stem.conv1.weight": lambda t: t[:2]}), "--image_checkpoint weights.pt", "stem"),
        (lambda: torch.save([1], "weights.pt"), "--image_checkpoint weights.pt", "weights.pt"),
        (lambda: torch.save({"a": Path("x")}, "weights.pt"), "--image_checkpoint weights.pt", "weights.pt"),
        (text("own_bert/config.json", "[]"), "--text_encoder own_bert", "own_bert"),
        (text("own_bert/config.json", '{"model_type": "nothing"}'), "--text_encoder own_bert", "own_bert"),
        (code("own_bert"), "--text_encoder own_bert", "own_bert"),
        (text("own_bert/vocab.txt", ""), "--text_encoder own_bert", "own_bert"),
    ],
}


@pytest.mark.parametrize(
    ("script", "spoil", "argv", "words"),
    [(script, *case) for script, cases in PARTS.items() for case in cases],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_part_that_is_wrong(script, spoil, argv, words, here, command, capsys):
    spoil()
    line = refused(script, command(script, argv), capsys)
    assert all(word in line for word in words.split()), line


def test_a_set_must_be_given(capsys):
    assert "--synset" in refused("evaluate", [], capsys)


# ---- any bytes: a set, a folder, annotations, each spoilt in a hundred places by chance


def any_set(name):
    try:
        load_synset(name)
    except InputError as error:
        assert "\n" not in str(error)


def any_rows(name):
    try:
        read_split("tiny", "train", Path(name).parent)
    except InputError as error:
        assert "\n" not in str(error)


@pytest.mark.parametrize(
    ("name", "read"),
    [
        ("set.safetensors", any_set),
        ("set.pt", any_set),
        ("folder/set.json", lambda name: any_set("folder")),
        ("folder/metadata.jsonl", lambda name: any_set("folder")),
        ("data/tiny_train.json", any_rows),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bytes_by_chance(name, read, here):
    path, draw = here / name, random.Random(name)
    whole = path.read_bytes()
    for _ in range(100):
        spoilt = bytearray(whole)
        for _ in range(draw.randint(1, 4)):  # near the start, where heads are
            place = draw.randrange(min(len(spoilt), 3000))
            spoilt[place : place + draw.choice((0, 1, 9))] = draw.choice(
                (b"", b"0", b'"', b"-", b"null", b"\xff", b"[]")
            )
        path.write_bytes(spoilt)
        read(name)


# ---- what a run leaves for itself: wrong, it is made anew


def test_a_run_goes_on_beside_a_spoilt_log(here, command, capsys):
    Path("run/metrics.jsonl").write_bytes(b'[]\n\xff\n{"step": "x", "Seconds": "y"}\n' + DEEP.encode() + b"\n")
    Path("run/report.json").write_text("[]")
    assert distill.main(command("distill", f"{RESUME.replace('3', '2')}")) == 0
    assert load_synset("run/last.safetensors").settings["iteration"] == 2


def test_a_set_may_say_how_its_encoder_normalises(here, command):
    settings(image_kwargs={"pretrained_cfg_overlay": {"mean": [0.5] * 3, "std": [0.5] * 3, "crop_pct": 1}})()
    assert evaluate.main(command("evaluate", "")) == 0


def test_features_of_another_run_are_made_anew(here, command, capsys):
    frozen = "--method herding --features image --cache_dir own --no_draw"
    assert coreset.main(command("coreset", frozen)) == 0
    chosen = load_synset("new/herding_4.safetensors").files
    (cache,) = Path("own").glob("image_*.safetensors")
    for change in (lambda t: t[:3], with_nan, lambda t: t.half()):
        tensors(str(cache), image_embed=change)()
        assert coreset.main(command("coreset", frozen)) == 0
        assert "making the image features anew" in capsys.readouterr().out
        assert load_synset("new/herding_4.safetensors").files == chosen
