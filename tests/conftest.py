"""The command line that goes with the tiny data set of tests/shared.py, and which worker runs which tests."""

import os
from pathlib import Path

import pytest

QUICK_BUFFER = ["--train_epochs", "2", "--batch_size_train", "60", "--lr_teacher_img", "0.01", "--disabled_wandb"]
QUICK_DISTILL = [
    *("--num_queries", "6", "--mini_batch_size", "4", "--syn_steps", "2", "--max_start_epoch", "2", "--eval_it", "2"),
    *("--num_eval", "2", "--epoch_eval_train", "1", "--lr_img", "10", "--lr_txt", "1", "--lr_lr", "1e-4"),
    *("--lr_teacher_img", "0.01", "--lr_teacher_txt", "0.1", "--disabled_wandb"),
]
UNSCORED = ["--num_eval", "1", "--no_draw", "--eval_it", "99"]  # for runs of whose scores nothing is asked
ENCODER_WEIGHTS = Path(__file__).parents[1] / "networks/demo_nfnet.safetensors"

os.environ["OMP_NUM_THREADS"] = "1"  # of the processes that tests start; the order of sums depends on it

# Files are run whole by one worker, which keeps what their fixtures made; the slowest first, so that all end together.
SLOWEST = ["processes", "kills", "on_gpu", "inputs", "matching", "several_encoders", "picture_forms", "soft_targets"]
PROCESSES = ["ranks", "ranks_distill", "ranks_matching"]  # forked off one process, see tests/processes.py


def pytest_configure(config):
    """What deals the tests to workers does without what they import."""
    if hasattr(config, "workerinput") or not getattr(config.option, "numprocesses", None):
        config.pluginmanager.import_plugin("tests.shared")


def group_of(nodeid):
    name = Path(nodeid.partition("::")[0]).stem.removeprefix("test_")
    return "processes" if name in PROCESSES else name


def pytest_collection_modifyitems(items):
    place = {name: number for number, name in enumerate(SLOWEST)}
    items.sort(key=lambda item: place.get(group_of(item.nodeid), len(place)))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    from xdist.scheduler import LoadFileScheduling

    class Groups(LoadFileScheduling):
        def _split_scope(self, nodeid):
            return group_of(nodeid)

    config.option.loadscopereorder = False
    return Groups(config, log)
