"""benchmarks.gpu: a rehearsal of some sections, what fails or is not reached, and what it makes of a profile."""

import importlib
import json

import pytest
import torch

from benchmarks.gpu import __main__ as on_gpu
from benchmarks.gpu import outer as gpu_outer
from benchmarks.gpu import profile as gpu_profile
from benchmarks.gpu.setup import TOY, Setup
from tests.programs import error_line
from utils.matching import OutOfMemory


def run(folder, *more):
    argv = ["--device", "cpu", "--toy", "--num_workers", "0", "--output", str(folder / "r"), *map(str, more)]
    assert on_gpu.main(argv) == 0
    return json.loads((folder / "r.json").read_text())["tables"], (folder / "r.md").read_text()


def test_rehearsal_of_some_sections(tmp_path, capsys):
    tables, page = run(tmp_path, "--sections", "card", "precision", "evaluation", "expert")
    assert list(tables) == ["The card", "Agreement with float64", "Evaluation of one network", "An expert's step"]
    assert all("rows" in result for measurements in tables.values() for result in measurements.values())
    for name, result in tables["Agreement with float64"].items():
        (cells,) = result["rows"].values()
        least = {"fp32": 0.99999, "tf32": 0.999, "bf16": 0.99}[name[:4]]
        assert least < float(cells["cosine of pictures"]) <= 1 and float(cells["cosine of texts"]) > least
    for result in tables["An expert's step"].values():
        (cells,) = result["rows"].values()
        assert cells["pictures/s"] == pytest.approx(4 / cells["s a step"])
        assert cells["share that waits for data"] == pytest.approx(1 - cells["s without data"] / cells["s a step"])
    assert page.startswith("# A rehearsal: these are no measurements") and "test_nfnet at 32 px" in page
    assert page.count("## ") == 4 and "Not measured" not in page


@pytest.fixture
def sections(monkeypatch):
    """Lets the section "card" have three measurements, the second of which comes out as given."""

    def replace(outcome):
        def rows(setup):
            yield "first", lambda: {"a": {"s": 1.5}}
            yield "second", outcome
            yield "third", lambda: {"b": {"s": 2.0, "note": "x|y"}}

        monkeypatch.setattr(gpu_outer, "card", rows)

    return replace


def fail(error):
    def call():
        raise error

    return call


def test_a_failure_costs_its_row_and_is_tried_again(tmp_path, sections, capsys):
    sections(fail(ValueError("wrong\nin two lines")))
    tables, page = run(tmp_path, "--sections", "card")
    assert tables["The card"]["second"] == {"failed": "ValueError: wrong in two lines"}
    assert "| a | 1.5 |  |\n| b | 2 | x/y |" in page
    assert "| The card | second | failed | ValueError: wrong in two lines |" in page
    sections(lambda: {"c": {"s": 3.0}})
    capsys.readouterr()
    tables, page = run(tmp_path, "--sections", "card")
    out = capsys.readouterr().out
    assert "2 measurements are in" in out and "The card: second" in out and "The card: first" not in out
    assert tables["The card"]["second"]["rows"] == {"c": {"s": 3.0}} and "Not measured" not in page


@pytest.mark.parametrize("error", [torch.cuda.OutOfMemoryError("full"), OutOfMemory("full")])
def test_full_memory_is_a_result(tmp_path, sections, error):
    sections(fail(error))
    tables, page = run(tmp_path, "--sections", "card")
    assert tables["The card"]["second"]["rows"] == {"second": {"note": "out of memory"}}


@pytest.mark.parametrize("missing", ["nothing.rows", "outer.nothing"])
def test_a_section_that_cannot_start_leaves_the_others(tmp_path, sections, monkeypatch, missing):
    sections(lambda: {"c": {"s": 3.0}})
    monkeypatch.setitem(on_gpu.SECTIONS, "profile", ("Broken", missing, {}))
    tables, _ = run(tmp_path, "--sections", "profile", "card")
    assert "Error" in tables["Broken"]["profile"]["failed"] and len(tables["The card"]) == 3


def test_what_the_time_does_not_allow_is_listed_and_run_later(tmp_path, sections):
    def endless():
        while True:
            pass

    sections(endless)
    tables, page = run(tmp_path, "--sections", "card", "--minutes", 0.01)
    assert [list(result)[0] for result in tables["The card"].values()] == ["rows", "not run", "not run"]
    assert "| The card | third | not run | no time left; run the command again |" in page
    sections(lambda: {"c": {"s": 3.0}})
    tables, _ = run(tmp_path, "--sections", "card")
    assert all("rows" in result for result in tables["The card"].values())


def test_numbers_of_something_else_are_not_carried_on(tmp_path, sections):
    sections(lambda: {"c": {"s": 3.0}})
    run(tmp_path, "--sections", "card")
    stored = json.loads((tmp_path / "r.json").read_text())
    stored["about"]["text"] += " Another card."
    (tmp_path / "r.json").write_text(json.dumps(stored))
    sections(fail(ValueError("anew")))
    tables, _ = run(tmp_path, "--sections", "card")
    assert "failed" in tables["The card"]["second"]


def test_a_device_that_is_not_there_is_one_line(capsys):
    line = error_line(capsys, on_gpu.main, ["--device", "nothing"])
    assert line.startswith("error: --device nothing cannot be used (")


def test_profile_of_known_kernels():
    """Two at once from 1 to 3 ms, nothing for 2 ms, one from 5 to 6, nothing for 4 ms, one from 10 to 11."""
    events = [("sgemm", 1, 3), ("Memcpy HtoD", 2, 3), ("sgemm", 5, 6), ("vectorized_elementwise", 10, 11)]
    rows = gpu_profile.describe([(name, start * 10**6, end * 10**6) for name, start, end in events])
    assert rows["recorded"] == {"ms": 10, "share": 1, "calls": 4}
    assert rows["nothing runs"] == {"ms": 6, "share": 0.6, "calls": 2} and rows["longest gap"]["ms"] == 4
    assert rows["products and convolutions"] == {"ms": 3, "share": 0.3, "calls": 2}
    assert rows["copies"]["ms"] == rows["element by element"]["ms"] == 1
    assert list(rows)[-3:] == ["1. sgemm", "2. Memcpy HtoD", "3. vectorized_elementwise"]


def test_kinds_of_kernels():
    kinds = {
        "void cutlass__5x_cudnn::Kernel<cutlass_tensorop_s1688wgrad_optimized_tf32>": "products and convolutions",
        "void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add<float>>": "element by element",
        "void at::native::reduce_kernel<512, 1, at::native::ReduceOp<float>>": "reductions and norms",
        "Memcpy DtoH (Device -> Pinned)": "copies",
        "something": "the rest",
    }
    assert {name: gpu_profile.kind_of(name) for name in kinds} == kinds


def test_students_train_what_their_names_say():
    setup = Setup(torch.device("cpu"), TOY, 0)
    adapters, heads, whole = (
        {
            name.split(".")[-1] if "parametrizations" in name else name.split(".")[0]
            for name in setup.problem(1, **changes).start
        }
        for changes in ({"image_encoder": TOY.transformer, "lora_rank": 4}, {"heads": True}, {})
    )
    assert adapters == {"A", "B", "text_projection"}
    assert heads == {"image_projection", "text_projection"} and whole == {"image_encoder", "text_projection"}


def test_every_section_is_there():
    for _, function, _ in on_gpu.SECTIONS.values():
        module, name = function.split(".")
        assert callable(getattr(importlib.import_module(f"benchmarks.gpu.{module}"), name))
