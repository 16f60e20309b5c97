"""A tiny data set and the command line that goes with it, shared by the tests."""

from pathlib import Path

import pytest

from data.demo import make_demo

ENCODER_WEIGHTS = Path(__file__).parents[1] / "networks/demo_nfnet.safetensors"


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory):
    """Folder of the data set "tiny": drawn scenes of 32 px, 24 / 8 / 8, five captions each."""
    root = tmp_path_factory.mktemp("data") / "tiny"
    make_demo(root, num_train=24, num_val=8, num_test=8, image_size=32)
    for split in ("train", "val", "test"):
        (root / f"demo_{split}.json").rename(root / f"tiny_{split}.json")
    return root


@pytest.fixture(scope="session")
def tiny_argv(tiny_data, tmp_path_factory):
    """Flags all scripts take for the data set "tiny" and the encoders of the demo; later flags override them."""
    return [
        *("--dataset", "tiny", "--image_root", str(tiny_data), "--ann_root", str(tiny_data), "--image_size", "32"),
        *("--image_encoder", "test_nfnet", "--image_checkpoint", str(ENCODER_WEIGHTS), "--text_encoder", "demo"),
        *("--text_pooling", "mean", "--num_workers", "0", "--device", "cpu"),
        *("--cache_dir", str(tmp_path_factory.mktemp("cache"))),
    ]
