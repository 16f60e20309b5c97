"""The benchmarks run; what they measure is not looked at."""

import json

import pytest
import torch
from transformers import BertConfig

import coreset
from benchmarks import expert_step, measure, outer_gradient, outer_iteration, same_numbers
from benchmarks.coco_size import __main__ as coco_size
from benchmarks.coco_size.make import make
from data.annotations import read_split
from tests.programs import table
from utils.files import save_tensors
from utils.sets import load_synset

SMALL = ["--image_size", "32", "--text_dim", "8", "--pairs", "3"]


def test_outer_gradient(capsys):
    flags = "--steps 1 --pair_chunk 2 --precision bf16 tf32 --float64 --repeats 1 --device cpu"
    outer_gradient.main([*SMALL, *flags.split()])
    _, rows = table(capsys.readouterr().out)
    assert len(rows) == 5
    for row in rows:
        way, error = row[2], float(row[8])
        assert error < {"bf16": 0.2, "tf32": 0.02}.get(way[-4:], 1e-3)


def test_outer_iteration(capsys):
    flags = ["--image_encoder", "test_nfnet", "--epochs", "2", "--repeats", "1", "--device", "cpu"]
    outer_iteration.main([*SMALL, *flags])
    assert "read ahead" in capsys.readouterr().out


def test_outer_iteration_of_heads(capsys):
    sizes = [["--of_heads", "16", "8", "6", batch, "4"] for batch in ("1", "6")]
    outer_iteration.main([*sizes[0], *sizes[1], "--momentum", "0.5", "--repeats", "1", "--device", "cpu"])
    _, rows = table(capsys.readouterr().out)
    assert [row[10] for row in rows] == ["rows", "weights"]
    assert all(float(error) < 1e-3 for row in rows for error in row[11:])


def test_step_of_an_expert(capsys, monkeypatch):
    small = BertConfig(num_hidden_layers=1, vocab_size=30522)
    monkeypatch.setattr(expert_step, "BertConfig", lambda: small)
    tiny = ["--image_encoder", "test_nfnet", "--image_size", "32", "--batch", "2", "--pictures", "4", "--repeats", "1"]
    expert_step.main([*tiny, "--device", "cpu"])
    head, rows = table(capsys.readouterr().out)
    assert head[4:9] == [f"{part}, s" for part in expert_step.PARTS]
    assert [row[0] for row in rows] == ["cached", *(f"decoded and embedded, {n} tokens" for n in (35, 24))]
    assert rows[0][2] == "1.00"


def test_peak_memory_of_a_known_call():
    peak = measure.peak_memory(lambda: torch.zeros(250_000).add(1).mul_(2).sum(), torch.device("cpu"))
    assert peak == pytest.approx(2_000_000, rel=0.01)


def test_operations_of_a_known_call():
    assert measure.count_operations(lambda: torch.zeros(2, 3) @ torch.zeros(3, 5)) == 2 * 2 * 3 * 5


def test_two_versions_are_compared_bit_for_bit(tmp_path, capsys):
    tensors = {"a": torch.arange(4.0), "b": torch.ones(2)}
    changed = {"a": torch.tensor([0.0, 1.0, 2.0, 3.0000002]), "b": torch.ones(2)}
    base, here = tmp_path / "base", tmp_path / "here"
    for name, there in {"same": tensors, "other": changed, "fewer": {"a": tensors["a"]}, "missing": None}.items():
        save_tensors(base / f"{name}.safetensors", tensors, {})
        if there is not None:
            save_tensors(here / f"{name}.safetensors", there, {})
    for folder, recall in ((base, 1.0), (here, 2.0)):
        (folder / "score.json").write_text(json.dumps({"rows": [{"mean": {"r_mean": recall}, "std": {"r_mean": 0.5}}]}))
    found = same_numbers.compare(base, here, tolerance=0.0)
    assert [name for name, text in found.items() if not text] == ["same.safetensors"]
    assert found["other.safetensors"].startswith("a differs by ") and found["missing.safetensors"] == "is not there"
    assert "['b']" in found["fewer.safetensors"] and found["score.json"] == "other recalls"
    assert same_numbers.report(found) == 1 and "5 files compared, 4 differ" in capsys.readouterr().out
    assert not same_numbers.compare(base, here, tolerance=1e-6)["other.safetensors"]


def test_data_of_coco_s_size_are_what_the_scripts_read(tmp_path, capsys):
    make(tmp_path, share=0.001)
    sizes = {split: read_split("coco", split, tmp_path / "annotations") for split in ("train", "val", "test")}
    assert {split: len(records) for split, records in sizes.items()} == {"train": 113, "val": 5, "test": 5}
    assert sum(len(record.captions) for record in sizes["train"]) == 567
    coco_size.read(tmp_path)
    argv = ["--method", "kmeans", "--num_queries", "3", "--no_draw", "--save_dir", str(tmp_path)]
    assert coreset.main([*coco_size.flags(tmp_path, tmp_path), *argv]) == 0
    assert load_synset(tmp_path / "kmeans_3.safetensors").text_syn.shape == (3, 768)
