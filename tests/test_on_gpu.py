"""benchmarks.gpu: its rehearsal, what fails, dies or is not reached, what is counted and made of a profile."""

import importlib
import json
import multiprocessing
import os
import signal
import time

import pytest
import torch

from benchmarks.gpu import __main__ as on_gpu
from benchmarks.gpu import child as gpu_child
from benchmarks.gpu import outer as gpu_outer
from benchmarks.gpu import profile as gpu_profile
from benchmarks.gpu.setup import TOY, Setup
from tests.programs import error_line
from utils.matching import OutOfMemory


def run(folder, *more):
    argv = ["--device", "cpu", "--toy", "--num_workers", "0", "--output", str(folder / "r"), *map(str, more)]
    assert on_gpu.main(argv) == 0
    return json.loads((folder / "r.json").read_text())["tables"], (folder / "r.md").read_text()


def test_every_section_is_there():
    # The first test: what it imports, forks of the others need not.
    for _, function, _ in gpu_child.SECTIONS.values():
        module, name = function.split(".")
        assert callable(getattr(importlib.import_module(f"benchmarks.gpu.{module}"), name))


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


@pytest.fixture
def forked(monkeypatch):
    """Children as forks of the test's process: what it patched holds in them, and they import nothing."""
    monkeypatch.setattr(on_gpu, "PROCESSES", multiprocessing.get_context("fork"))


def test_the_whole_rehearsal(tmp_path, forked):
    tables, page = run(tmp_path)
    assert list(tables) == [gpu_child.SECTIONS[section][0] for section in on_gpu.DEFAULT]
    assert all("rows" in result for measurements in tables.values() for result in measurements.values())
    assert page.startswith("# A rehearsal: these are no measurements") and "test_nfnet at 32 px" in page
    assert page.count("## ") == 8 and "Not measured" not in page and page.count("is an estimate") == 2
    for title in list(tables)[1:3]:  # distill.py
        ((cells,),) = (result["rows"].values() for result in tables[title].values())
        rate = tables["The card"]["matrix product"]["rows"]["tf32 product"]["TFLOP/s"]
        share = cells["TFLOP"] / cells["s an iteration"] / rate
        assert cells["share of tf32 rate"] == pytest.approx(share) and cells["GB read and written"] > 0.01
        assert cells["launches"] == cells["GB to card"] == cells["s on an RTX 3090, estimated"] == "-"
    for name, result in tables["Agreement with float64"].items():
        (cells,) = result["rows"].values()
        least = {"fp32": 0.99999, "tf32": 0.999, "bf16": 0.99}[name[:4]]
        assert least < float(cells["cosine of pictures"]) <= 1 and float(cells["cosine of texts"]) > least
    for result in tables["An expert's step"].values():
        (cells,) = result["rows"].values()
        assert cells["pictures/s"] == pytest.approx(4 / cells["s a step"])
        assert cells["share that waits for data"] == pytest.approx(1 - cells["s without data"] / cells["s a step"])


def test_a_process_of_its_own_measures(tmp_path):
    tables, _ = run(tmp_path, "--sections", "card")
    assert list(tables["The card"]["matrix product"]["rows"]) == ["tf32 product", "bf16 product", "fp32 product"]
    assert not torch.cuda.is_initialized()


@pytest.fixture
def sections(monkeypatch, forked):
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


def end_self(how):
    os.kill(os.getpid(), signal.SIGKILL) if how == "killed" else os._exit(7)


@pytest.mark.parametrize(
    ("how", "why"),
    [("killed", "was killed by SIGKILL; is the host's memory full?"), ("exits", "ended with code 7")],
)
def test_a_process_that_dies_costs_its_row(tmp_path, sections, capsys, how, why):
    sections(lambda: end_self(how))
    tables, page = run(tmp_path, "--sections", "card", "card")
    assert [list(result)[0] for result in tables["The card"].values()] == ["rows", "failed", "rows"]
    assert f"| The card | second | failed | the process {why} |" in page
    assert capsys.readouterr().out.count("The card: second") == 1  # not tried again in the same call
    sections(lambda: {"c": {"s": 3.0}})
    tables, page = run(tmp_path, "--sections", "card")
    out = capsys.readouterr().out
    assert "2 measurements are in" in out and "The card: second" in out and "Not measured" not in page


def test_a_process_that_dies_between_rows_costs_the_rest_of_its_section(tmp_path, sections, monkeypatch):
    def rows(setup):
        yield "first", lambda: {"a": {"s": 1.5}}
        end_self("exits")

    sections(lambda: {"c": {"s": 3.0}})
    monkeypatch.setattr(gpu_profile, "where_the_time_goes", rows)
    tables, _ = run(tmp_path, "--sections", "profile", "card")
    assert len(tables["The card"]) == 3 and "rows" in tables["Where the time goes"]["first"]
    assert tables["Where the time goes"]["profile"] == {"failed": "the process ended with code 7"}


def test_after_a_broken_context_another_process_goes_on(tmp_path, sections, monkeypatch):
    monkeypatch.setattr(gpu_child, "still_works", lambda device: False)  # asked after a failure alone
    real = gpu_child.end_with_parent
    monkeypatch.setattr(gpu_child, "end_with_parent", lambda: real() or (tmp_path / str(os.getpid())).touch())
    sections(fail(RuntimeError("CUDA error: an illegal memory access was encountered")))
    tables, page = run(tmp_path, "--sections", "card")
    reason = tables["The card"]["second"]["failed"]
    assert reason.endswith("illegal memory access was encountered (nothing more worked in this process)")
    assert "rows" in tables["The card"]["third"]
    assert len([path for path in tmp_path.iterdir() if path.name.isdigit()]) == 2  # processes


def test_a_process_that_cannot_begin_is_one_line(capsys, tmp_path, forked, monkeypatch):
    monkeypatch.setattr(gpu_child, "end_with_parent", lambda: os._exit(9))
    line = error_line(capsys, on_gpu.main, ["--device", "cpu", "--toy", "--output", str(tmp_path / "r")])
    assert line == "error: the process that measures ended with code 9 before it measured anything"


def test_one_that_does_not_stop_is_ended(tmp_path, sections, monkeypatch):
    def deaf():
        signal.signal(signal.SIGALRM, signal.SIG_IGN)
        time.sleep(60)

    sections(deaf)
    monkeypatch.setattr(on_gpu, "PATIENCE", 3)
    tables, _ = run(tmp_path, "--sections", "card", "--minutes", 0.01)
    assert tables["The card"]["second"] == {"failed": "the process did not stop when the time was over"}
    assert "not run" in tables["The card"]["third"]


@pytest.fixture
def interruptible():
    """Ctrl-C raises, as in a program that a person starts; a shell's background job ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_ctrl_c_ends_both(tmp_path, sections, interruptible, capsys):
    def interrupt():
        (tmp_path / "child").write_text(str(os.getpid()))
        os.kill(os.getppid(), signal.SIGINT)
        time.sleep(60)

    sections(interrupt)
    argv = ["--device", "cpu", "--toy", "--sections", "card", "--output", str(tmp_path / "r")]
    assert on_gpu.main(argv) == 130 and capsys.readouterr().err == "interrupted\n"
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "child").read_text()), 0)
    assert list(json.loads((tmp_path / "r.json").read_text())["tables"]["The card"]) == ["first"]


@pytest.mark.parametrize("missing", ["nothing.rows", "outer.nothing"])
def test_a_section_that_cannot_start_leaves_the_others(tmp_path, sections, monkeypatch, missing):
    sections(lambda: {"c": {"s": 3.0}})
    monkeypatch.setitem(gpu_child.SECTIONS, "profile", ("Broken", missing, {}))
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


def test_a_device_that_is_not_there_is_one_line(capsys, forked):
    line = error_line(capsys, on_gpu.main, ["--device", "nothing"])
    assert line.startswith("error: --device nothing cannot be used (")


def test_what_a_trace_says_of_copies_and_launches():
    def copy(name, gigabytes):
        return {"cat": "gpu_memcpy", "name": f"Memcpy {name}", "args": {"bytes": gigabytes * 10**9}}

    events = [
        *(copy("HtoD (Pinned -> Device)", 2), copy("HtoD (Pageable -> Device)", 1), copy("DtoD (Device -> Device)", 9)),
        *(copy("DtoH (Device -> Pinned)", 4), {"cat": "kernel", "name": "sgemm"}, {"cat": "cuda_runtime"}, {"ph": "M"}),
    ]
    assert gpu_profile.of_trace(events) == {"GB to card": 3, "GB to host": 4, "launches": 1}
    assert gpu_profile.of_trace([{"cat": "cpu_op", "name": "aten::mm"}]) == {}


def test_operations_and_bytes_that_are_counted():
    left, right = torch.ones(100, 200), torch.ones(200, 300)
    with gpu_profile.Counter(torch.device("cpu")) as counter:
        product = left @ right.view(200, 300)  # a view moves nothing
        torch.empty(1000)
        product.add_(torch.ones(1, dtype=torch.float32).expand(100, 300))
    of_product, of_sum, of_ones = 4 * (100 * 200 + 200 * 300 + 100 * 300), 4 * (2 * 100 * 300 + 1), 4
    assert counter.operations == 2 * 100 * 200 * 300
    assert counter.bytes == of_product + of_sum + of_ones
    seconds = max(counter.operations / 35.6e12, of_product / 936e9) + (of_sum + of_ones) / 936e9
    assert counter.seconds == pytest.approx(seconds)


def test_the_estimate_takes_the_slower_of_launches_and_arithmetic_and_all_copies():
    setup = Setup(torch.device("cpu"), TOY, 0)
    asked = gpu_profile.Asked(setup)
    asked.counter.operations, asked.counter.seconds = 10**12, 0.4
    asked.copied = {"GB to card": 2.0, "GB to host": 0.5, "launches": 50_000}
    estimated = "s on an RTX 3090, estimated"
    assert asked.columns(1.0)[estimated] == pytest.approx(0.4 + 2.5 / 25)
    asked.copied["launches"] = 100_000
    assert asked.columns(1.0)[estimated] == pytest.approx(0.5 + 2.5 / 25)
    assert asked.columns(2.0)["share of tf32 rate"] == pytest.approx(10**12 / 2 / setup.rate("tf32"))


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
