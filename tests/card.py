"""What the tests on a CUDA card share."""

import pytest
import torch

CARD = torch.device("cuda", 0)
NEEDS_CARD = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA card")]


@pytest.fixture(autouse=True)
def full_precision():
    """Single precision without tf32 at the start; the scripts turn it on for the whole process."""
    backends = torch.backends.cuda.matmul, torch.backends.cudnn
    before = [backend.allow_tf32 for backend in backends]
    for backend in backends:
        backend.allow_tf32 = False
    yield
    for backend, allowed in zip(backends, before, strict=True):
        backend.allow_tf32 = allowed


def fill_the_card(*args, **student):
    """Raises torch.cuda.OutOfMemoryError as torch does it."""
    return torch.empty(2**50, dtype=torch.uint8, device=CARD)
