"""Whether this version computes what another one did: small runs of everything, compared bit for bit.

    python -m benchmarks.same_numbers --base COMMIT

Both versions train experts, distil with every recipe, choose coresets and score them, on one thread, on drawn scenes.
All tensors that they save and all recalls must be the same; `--tolerance` allows a relative difference.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from safetensors import safe_open

ROOT = Path(__file__).parents[1]
SCENES = """
from pathlib import Path
import sys
from data.demo import make_demo
root = Path(sys.argv[1])
make_demo(root, num_train=40, num_val=16, num_test=16, image_size=32)
for split in ("train", "val", "test"):
    (root / f"demo_{split}.json").rename(root / f"scenes_{split}.json")
"""
QUICK = "--eval_it 2 --num_eval 1 --epoch_eval_train 2 --Iteration 3 --no_report --disabled_wandb"
DISTILL = f"distill.py --num_queries 8 --mini_batch_size 4 --syn_steps 3 --max_start_epoch 2 {QUICK}"
RATES = "--lr_img 10 --lr_txt 1 --lr_lr 1e-4 --lr_teacher_img 0.01 --lr_teacher_txt"
ON_WHOLE, ON_LORA, ON_HEADS = (f"--buffer_path {{out}}/{name}" for name in ("whole", "lora", "heads"))
LORA = "--lora_rank 2 --lora_layers all"
EXPERTS = "buffer.py --num_experts 1 --train_epochs 6 --keep_epochs 6 --batch_size_train 64 --disabled_wandb"
METHODS = "random", "herding", "kcenter", "kmeans", "forgetting"
CORESET = "coreset.py --num_queries 6 --train_epochs 2 --no_draw --output {out}/{name}"
SCORE = "evaluate.py --num_eval 2 --epoch_eval_train 2 --json {out}/{name}"
# What is run, by the name of its folder or file; `{out}` is the folder of the version's results.
RUNS = {
    "whole": f"{EXPERTS} --lr_teacher_img 0.01 {ON_WHOLE}",
    "lora": f"{EXPERTS} --lr_teacher_img 0.01 {LORA} {ON_LORA}",
    "heads": f"{EXPERTS} --recipe heads --aug_views 2 {ON_HEADS}",
    "wu2024": f"{DISTILL} {RATES} 0.1 {ON_WHOLE}",
    "chunks": f"{DISTILL} {RATES} 0.1 --pair_chunk 3 --student_momentum 0.5 {ON_WHOLE}",
    "tesla": f"{DISTILL} {RATES} 0.1 --adjoint_decay 0 --image_only {ON_WHOLE}",
    "of_lora": f"{DISTILL} {RATES} 0.1 {LORA} {ON_LORA}",
    "adam": f"{DISTILL} --recipe adam {ON_WHOLE}",
    "of_heads": f"{DISTILL} --recipe heads {ON_HEADS}",
    "lors": f"{DISTILL} --recipe lors {RATES} 0.01 {ON_WHOLE} --lr_teacher_img 0.001",
    "lors_nce": f"{DISTILL} --recipe lors {RATES} 0.01 --loss_type NCE {ON_WHOLE} --lr_teacher_img 0.001",
    "repblend": f"{DISTILL} --recipe repblend {RATES} 0.01 {ON_HEADS}",
    "ptmst": f"{DISTILL} --recipe ptmst {RATES} 0.01 --phases 2 {ON_HEADS}",
    **{f"{method}.safetensors": f"{CORESET} --method {method}" for method in METHODS},
    "score.json": f"{SCORE} --synset {{out}}/wu2024/best.safetensors {{out}}/kmeans.safetensors"
    " --all_data {out}/whole --looks 2",
    "score_heads.json": f"{SCORE} --tune_rates"
    " --synset {out}/of_heads/last.safetensors {out}/ptmst/best.safetensors",
}


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--base", required=True, help="the other version, a commit")
    parser.add_argument("--tolerance", type=float, default=0.0, help="relative difference of a tensor, by its norm")
    parser.add_argument("--work", type=Path, help="folder that is kept; what it holds of the base is used again")
    return parser.parse_args(argv)


def main(argv=None) -> int:
    args = parse_args(argv)
    with tempfile.TemporaryDirectory() as temporary:
        work = (args.work or Path(temporary)).absolute()
        work.mkdir(parents=True, exist_ok=True)
        results = {name: work / name for name in ("base", "here")}
        code, data = {"base": work / "code", "here": ROOT}, work / "data"
        if not code["base"].exists():
            subprocess.run(["git", "-C", ROOT, "worktree", "add", "--detach", code["base"], args.base], check=True)
        if not data.exists():
            subprocess.run([sys.executable, "-c", SCENES, data], cwd=code["base"], check=True)
        shutil.rmtree(results["here"], ignore_errors=True)
        for version, folder in results.items():
            run_all(code[version], folder, data)
        differences = compare(results["base"], results["here"], args.tolerance)
        if not args.work:
            subprocess.run(["git", "-C", ROOT, "worktree", "remove", "--force", code["base"]], check=True)
    return report(differences)


def run_all(code: Path, out: Path, data: Path) -> None:
    """Runs what has no result yet."""
    shared = f"--dataset scenes --image_root {data} --ann_root {data} --image_size 32 --image_encoder test_nfnet"
    shared += f" --image_checkpoint {code}/networks/demo_nfnet.safetensors --text_encoder demo --text_pooling mean"
    shared += f" --device cpu --cache_dir {out}/cache"
    out.mkdir(exist_ok=True)
    for name, command in RUNS.items():
        done = out / f"{name}.done"
        if done.exists():
            continue
        script, *flags = command.format(out=out, name=name).split()
        flags += shared.split() if script != "evaluate.py" else []
        flags += ["--save_dir", str(out / name)] if script == "distill.py" else []
        flags += ["--num_workers", "0"] if script in ("buffer.py", "coreset.py") else []
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(code)}
        command = [sys.executable, str(code / script), *flags]
        ended = subprocess.run(command, cwd=code, env=environment, capture_output=True, text=True)
        if ended.returncode:
            raise SystemExit(f"{code}: {name} failed: {' '.join(command)}\n{ended.stderr}")
        done.touch()


def compare(base: Path, here: Path, tolerance: float) -> dict[str, str]:
    """What differs, by the file's name, and "" for a file that does not."""
    files = [*base.rglob("*.safetensors"), *base.glob("*.json")]
    names = sorted(str(file.relative_to(base)) for file in files if "cache" not in file.parts)
    return {name: difference(base / name, here / name, tolerance) for name in names}


def difference(old: Path, new: Path, tolerance: float) -> str:
    if not new.exists():
        return "is not there"
    if old.suffix == ".json":
        rows = [[(row["mean"], row["std"]) for row in json.loads(path.read_text())["rows"]] for path in (old, new)]
        return "" if rows[0] == rows[1] else "other recalls"
    tensors = [tensors_of(path) for path in (old, new)]
    if tensors[0].keys() != tensors[1].keys():
        return f"other tensors: {sorted(tensors[0].keys() ^ tensors[1].keys())}"
    worst = max(((apart(value, tensors[1][name]), name) for name, value in tensors[0].items()), default=(0.0, ""))
    return "" if worst[0] <= tolerance else f"{worst[1]} differs by {worst[0]:.1e}"


def tensors_of(path: Path) -> dict[str, torch.Tensor]:
    with safe_open(path, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, it is no dict


def apart(old: torch.Tensor, new: torch.Tensor) -> float:
    if old.shape != new.shape or old.dtype != new.dtype:
        return float("inf")
    if torch.equal(old, new):
        return 0.0
    old, new = old.double(), new.double()
    return ((old - new).norm() / old.norm().clamp(min=1e-30)).item()


def report(differences: dict[str, str]) -> int:
    for name, text in differences.items():
        if text:
            print(f"{name}: {text}")
    wrong = sum(map(bool, differences.values()))
    print(f"{len(differences)} files compared, {wrong} differ")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
