"""What a run says that it computes on, and products that are never in tf32."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from networks.loss import LOSS_TYPES, PairLoss
from utils.device import describe_device
from utils.scoring.retrieval import recalls


def test_the_device_is_said(monkeypatch):
    line = describe_device(torch.device("cpu"))
    assert line.startswith(f"running on cpu ({torch.get_num_threads()} threads), torch {torch.__version__}")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (6 * 10**9, 8 * 10**9))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "A Card")
    line = describe_device(torch.device("cuda", 0))
    assert line == f"running on cuda:0 (A Card, 6.0 of 8.0 GB free), torch {torch.__version__}"


def test_a_build_for_cuda_says_why_it_runs_on_the_cpu(monkeypatch):
    def fail():
        raise RuntimeError("The NVIDIA driver on your system is too old (found version 12020). Please update it.\nMore")

    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "init", fail)
    line = describe_device(torch.device("cpu"))
    assert line.endswith("no GPU: The NVIDIA driver on your system is too old (found version 12020)")
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "no GPU" not in describe_device(torch.device("cpu"))


class Products(TorchDispatchMode):
    """Whether tf32 was allowed, for each matrix product."""

    def __init__(self):
        super().__init__()
        self.allowed = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func._overloadpacket is torch.ops.aten.mm:
            self.allowed.append(torch.backends.cuda.matmul.allow_tf32)
        return func(*args, **(kwargs or {}))


@pytest.fixture
def tf32():
    before, torch.backends.cuda.matmul.allow_tf32 = torch.backends.cuda.matmul.allow_tf32, True
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_the_losses_own_products_are_in_full_precision(loss_type, tf32):
    features = torch.nn.functional.normalize(torch.randn(4, 3, generator=torch.Generator().manual_seed(0)))
    with Products() as products:
        PairLoss(loss_type)(features, features.flip(0))
    assert products.allowed == [False] and torch.backends.cuda.matmul.allow_tf32


def test_retrieval_scores_are_in_full_precision(tf32):
    features = torch.nn.functional.normalize(torch.randn(4, 3, generator=torch.Generator().manual_seed(0)))
    with Products() as products:
        recalls(features, features, torch.arange(4))
    assert products.allowed == [False, False] and torch.backends.cuda.matmul.allow_tf32
