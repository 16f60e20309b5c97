"""Planning of the pairs in memory, full memory as one line, and reading ahead."""

import threading

import pytest
import torch
from safetensors.torch import load_file

import distill
from data.errors import InputError
from tests.conftest import UNSCORED
from utils.experts import Trajectory
from utils.matching.memory import OutOfMemory, free_memory, guarded, pair_chunk_advice, plan_graphs, plan_pair_chunk
from utils.matching.prefetch import Prefetch

# ---- the chunk that fits


def test_planned_chunk_fills_the_free_memory():
    # 100 bytes and 10 a pair: 0.85 of 1000 bytes hold (850 - 100) / 10 pairs.
    assert plan_pair_chunk((2, 4), [120, 140], 1000, 100) == (75, 0)
    assert plan_pair_chunk((2, 4), [120, 140], 1000, 75) == (None, 0)
    assert plan_pair_chunk((2, 4), [120, 140], 1000, 50) == (None, 250)
    assert plan_pair_chunk((2, 4), [120, 140], 10, 100) == (1, 0)
    assert plan_pair_chunk((1, 1), [110, 110], 1000, 1)[0] is None
    assert plan_pair_chunk((2, 4), [120, 120], 1000, 100)[0] is None  # no growth seen


def test_graphs_are_kept_as_memory_has_room():
    # One graph of 100 bytes there must be; 250 bytes beside it hold two more, of at most all steps.
    assert [plan_graphs(8, 100, spare) for spare in (-50, 0, 99, 100, 250, 10_000)] == [1, 1, 1, 2, 3, 8]


def test_a_run_that_keeps_graphs_gives_the_same_set(run_distill, tmp_path, monkeypatch):
    real, kept = distill.mean_matching, []

    def seen(*args, keep, **student):
        kept.append(keep.graphs)
        return real(*args, keep=keep, **student)

    monkeypatch.setattr(distill, "mean_matching", seen)
    for name, host_bytes in (("all", 4e9), ("one", 0)):
        monkeypatch.setattr("utils.matching.memory.HOST_BYTES", host_bytes)
        assert run_distill(tmp_path / name, "--Iteration", 1, "--syn_steps", 3, *UNSCORED) == 0
    assert kept == [3, 1]
    first, second = (load_file(tmp_path / name / "last.safetensors") for name in ("all", "one"))
    assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize(
    ("share", "reserved", "free"), [(1.0, 10, 60), (0.5, 10, 40), (0.5, 0, 50), (0.7, 10, 60), (0.05, 10, 0)]
)
def test_free_memory_is_within_the_share_of_the_process(monkeypatch, share, reserved, free):
    """60 of 100 bytes are free on the card; what this process has reserved counts against its share."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (60, 100))
    monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", lambda device: share)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: reserved)
    assert free_memory(torch.device("cuda")) == free


# ---- full memory


def full(*args, **kwargs):
    raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")


def test_guarded_frees_what_the_failed_call_held():
    with pytest.raises(OutOfMemory, match="^CUDA is out of memory; give --pair_chunk 25$") as caught:
        guarded(full, lambda: pair_chunk_advice(50))
    assert caught.value.__context__ is None
    assert guarded(lambda: 3, str) == 3
    assert "smaller --image_encoder" in pair_chunk_advice(1)


@pytest.mark.parametrize(
    ("flags", "advice"), [(["--pair_chunk", 3], "--pair_chunk 1"), (["--pair_chunk", 9], "--pair_chunk 2")]
)
def test_full_memory_names_the_flag_and_saves_the_set(run_distill, tmp_path, capsys, monkeypatch, flags, advice):
    """Batches of 4 pairs; memory runs out in the second iteration."""
    real, calls = distill.mean_matching, []

    def second_is_full(*args, **student):
        calls.append(args)
        return real(*args, **student) if len(calls) == 1 else full()

    monkeypatch.setattr(distill, "mean_matching", second_is_full)
    assert run_distill(tmp_path / "run", "--Iteration", 4, *flags, *UNSCORED) == 2
    out, err = capsys.readouterr()
    assert err.strip().splitlines()[-1] == f"error: CUDA is out of memory; give {advice}"
    assert "last good set is" in out and "stopped at iteration 1" in out
    assert (tmp_path / "run/last.safetensors").exists()
    monkeypatch.undo()
    assert run_distill(tmp_path / "run", "--Iteration", 4, "--resume", "--pair_chunk", 2, *UNSCORED) == 0


@pytest.mark.parametrize(
    "text",
    [
        "GET was unable to find an engine to execute this computation",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
        "CUDA error: out of memory",
    ],
)
def test_full_memory_has_many_names(text):
    def fail():
        raise RuntimeError(text)

    with pytest.raises(OutOfMemory):
        guarded(fail, str)


def test_a_chunk_that_was_not_given_is_halved_and_tried_again(run_distill, tmp_path, capsys, monkeypatch):
    """Four pairs fail, two do not; then the run is that of --pair_chunk 2 from the failed iteration on."""
    real, sizes = distill.mean_matching, []

    def four_do_not_fit(*args, pair_chunk, **student):
        sizes.append(pair_chunk)
        if pair_chunk is None and len(sizes) == 2:
            raise RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED")
        return real(*args, pair_chunk=pair_chunk, **student)

    monkeypatch.setattr(distill, "mean_matching", four_do_not_fit)
    assert run_distill(tmp_path / "run", "--Iteration", 3, *UNSCORED) == 0
    assert sizes == [None, None, 2, 2]
    assert "CUDA is out of memory with 4 pairs at a time; going on with 2" in capsys.readouterr().out


def test_memory_that_no_chunk_fits_saves_the_set(run_distill, tmp_path, capsys, monkeypatch):
    real, calls = distill.mean_matching, []

    def second_is_full(*args, **student):
        calls.append(student["pair_chunk"])
        return real(*args, **student) if len(calls) == 1 else full()

    monkeypatch.setattr(distill, "mean_matching", second_is_full)
    assert run_distill(tmp_path / "run", "--Iteration", 3, *UNSCORED) == 2
    out, err = capsys.readouterr()
    assert calls == [None, None, 2, 1] and "smaller --image_encoder" in err.strip().splitlines()[-1]
    assert "stopped at iteration 1" in out and (tmp_path / "run/state.safetensors").exists()


def test_other_errors_are_not_taken_for_full_memory():
    def broken():
        raise RuntimeError("a shape does not fit")

    with pytest.raises(RuntimeError, match="a shape"):
        guarded(broken, str)


def test_full_memory_in_an_evaluation(run_distill, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(distill, "evaluate_synset", full)
    assert run_distill(tmp_path, "--Iteration", 1) == 2
    assert "give --batch_train 3 and --batch_size_test 64" in capsys.readouterr().err


def test_chunks_distil_the_same_set(metrics, straight, run_distill, tmp_path):
    """test_nfnet has no dropout in its image tower, so that only the rounding differs."""
    assert run_distill(tmp_path / "run", "--Iteration", 4, "--pair_chunk", 3, *UNSCORED) == 0
    losses = (
        [line["Grand_Loss"] for line in metrics(run) if "Grand_Loss" in line] for run in (straight, tmp_path / "run")
    )
    torch.testing.assert_close(*(torch.tensor(values) for values in losses), rtol=1e-3, atol=1e-4)


def test_bf16_distils(metrics, run_distill, straight, tmp_path):
    assert run_distill(tmp_path / "run", "--Iteration", 2, "--precision", "bf16", *UNSCORED) == 0
    first, exact = metrics(tmp_path / "run"), metrics(straight)
    loss, wanted = (next(line["Grand_Loss"] for line in lines if "Grand_Loss" in line) for lines in (first, exact))
    assert loss != wanted and loss == pytest.approx(wanted, rel=0.2)


# ---- reading ahead


def test_prefetch_reads_one_ahead_in_another_thread():
    read, threads = [], set()

    def note(iteration):
        read.append(iteration)
        threads.add(threading.get_ident())
        return -iteration

    prefetch = Prefetch(note, end=5)
    assert [prefetch.take(iteration) for iteration in (2, 3, 4)] == [-2, -3, -4]
    prefetch.close()
    assert read == [2, 3, 4]
    assert threading.get_ident() not in threads


def test_an_error_while_reading_ahead_is_raised_where_it_is_needed():
    def fail_at_one(iteration):
        if iteration == 1:
            raise InputError("gone")
        return iteration

    prefetch = Prefetch(fail_at_one, end=3)
    assert prefetch.take(0) == 0
    with pytest.raises(InputError, match="gone"):
        prefetch.take(1)
    prefetch.close()


def test_an_expert_that_vanishes_is_one_line(run_distill, tmp_path, capsys, monkeypatch):
    calls = []

    def vanish(*args):
        calls.append(args)
        if len(calls) == 3:
            raise OSError("Input/output error")
        return snapshot(*args)

    snapshot = Trajectory.snapshot
    monkeypatch.setattr("utils.experts.trajectory.Trajectory.snapshot", vanish)
    assert run_distill(tmp_path, "--Iteration", 4) == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("error: expert ") and "can no longer be read (Input/output error)" in last
