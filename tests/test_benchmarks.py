"""The benchmarks run; what they measure is not looked at."""

import json

import pytest
import torch

from benchmarks import measure, memory_estimate, outer_gradient, outer_iteration, same_numbers
from utils.files import save_tensors

SMALL = ["--image_size", "32", "--text_dim", "8", "--pairs", "3"]


def test_outer_gradient(capsys):
    flags = [
        "--steps",
        "1",
        "--pair_chunk",
        "2",
        "--precision",
        "bf16",
        "tf32",
        "--float64",
        "--repeats",
        "1",
        "--device",
        "cpu",
    ]
    outer_gradient.main([*SMALL, *flags])
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert len(rows) == 2 + 5
    for row in rows[2:]:
        way, error = row.split("|")[3].strip(), float(row.split("|")[9])
        assert error < {"bf16": 0.2, "tf32": 0.02}.get(way[-4:], 1e-3)


def test_outer_iteration(capsys):
    flags = ["--image_encoder", "test_nfnet", "--epochs", "2", "--repeats", "1", "--device", "cpu"]
    outer_iteration.main([*SMALL, *flags])
    assert "read ahead" in capsys.readouterr().out


def test_memory_estimate_is_near_the_measured_peak(capsys):
    flags = [*SMALL[:-1], "8", "--image_encoder", "test_nfnet", "--pair_chunk", "4"]
    memory_estimate.main(flags)
    estimated = [line.split("|") for line in capsys.readouterr().out.splitlines()[-2:]]
    args = memory_estimate.parse_args(flags)
    for line, chunk in zip(estimated, (None, 4), strict=True):
        peak = memory_estimate.peak(args, 8, chunk)
        assert float(line[2]) == pytest.approx(peak / 1e9, rel=0.1, abs=0.01)


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
