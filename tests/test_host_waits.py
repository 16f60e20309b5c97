"""The sweep never asks a device for a number: shown without a card, on tensors that have a shape alone.

torch's meta device stands for the card. It has no numbers to give, so that whatever would make the host wait for one
fails there; copies between it and the host are listed, and must not be waited for. tests/test_cuda.py has the card.
"""

import contextlib

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from data.augment import Augment
from networks.lora import Lora
from tests.unroll import NUM_PAIRS, Problem
from utils.matching import Dictionary
from utils.sets import Pairs, initial_similarity
from utils.student import StudentLoss, matching_gradient

INDICES = ("aten._to_copy.default", True)  # one copy from the host, not waited for


class Crossings(TorchDispatchMode):
    """Operations that tensors of both devices take part in, as (name, non_blocking)."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        tensors = [value for value in tree_leaves((args, kwargs, result)) if isinstance(value, torch.Tensor)]
        if len({tensor.device.type for tensor in tensors}) > 1:
            self.seen.append((str(func), (kwargs or {}).get("non_blocking", False)))
        return result


@pytest.fixture(autouse=True)
def autocast_knows_no_meta(monkeypatch):
    monkeypatch.setattr(torch, "autocast", lambda *args, **kwargs: contextlib.nullcontext())


def on_meta(encoder, **settings):
    """The arguments of `matching_gradient`, with only the indices of the batches left on the host."""
    problem = Problem(encoder, **settings).single()
    _, start, target, pairs, batches, seed = problem.arguments(2)
    problem.model.to("meta")
    start, target = ({name: value.to("meta") for name, value in values.items()} for values in (start, target))
    return problem.loss_fn, start, target, Pairs(*(tensor.to("meta") for tensor in pairs.tensors())), batches, seed


@pytest.mark.parametrize(
    ("encoder", "settings", "pair_chunk"),
    [("test_nfnet", {}, None), ("test_nfnet", {}, 2), ("test_vit", {"lora": Lora(2, 4.0)}, 2)],
)
def test_one_copy_of_indices_is_all_that_crosses(encoder, settings, pair_chunk):
    arguments = on_meta(encoder, **settings)
    with Crossings() as crossings:
        matching = matching_gradient(*arguments, pair_chunk, momentum=0.9, adjoint_decay=0.5)
    assert matching.gradient.image_syn.device.type == "meta"
    assert crossings.seen == [INDICES]


@pytest.mark.parametrize("pair_chunk", [None, 2])
def test_a_frozen_encoder_adds_one_copy(pair_chunk):
    arguments = on_meta("test_nfnet", freeze="image_encoder", image_projection=True)
    with Crossings() as crossings:
        matching_gradient(*arguments, pair_chunk, momentum=0.9)
    assert crossings.seen == [INDICES, INDICES]


@pytest.mark.parametrize(
    ("freeze", "settings"),
    [
        (None, {"loss_type": "WBCE", "sim_type": "lowrank"}),  # lors
        ("image_encoder", {"loss_type": "WBCE", "sim_type": "lowrank"}),  # heads
        ("image_encoder", {"loss_type": "WBCE", "sim_type": "full"}),  # ptmst
        ("image_encoder", {"loss_type": "WBCE", "sim_type": "lowrank", "blend_alpha": 1.0}),  # repblend
        ("image_encoder", {"loss_type": "NCE", "sim_type": "none"}),
        ("image_encoder", {"loss_type": "BCE", "sim_type": "full"}),
    ],
)
def test_no_recipe_asks_the_device(freeze, settings, monkeypatch):
    # torch has no gamma distribution for the meta device; what it is asked for before and after is what counts.
    monkeypatch.setattr(torch, "_standard_gamma", lambda concentration: torch.empty_like(concentration))
    monkeypatch.setattr(torch, "_sample_dirichlet", lambda concentration: torch.empty_like(concentration))
    loss_fn, start, target, pairs, batches, seed = on_meta(
        "test_nfnet", freeze=freeze, image_projection=bool(freeze), loss_type=settings["loss_type"]
    )
    parts = initial_similarity(settings["sim_type"], NUM_PAIRS, 2, torch.Generator().manual_seed(0))
    pairs = Pairs.of([*pairs.tensors(), *(part.to("meta") for part in parts)])
    loss_fn = StudentLoss(loss_fn.model, alpha=3.0, blend_alpha=settings.get("blend_alpha", 0.0))
    with Crossings() as crossings:
        matching_gradient(loss_fn, start, target, pairs, batches, seed, momentum=0.9)
    assert set(crossings.seen) == {INDICES} and len(crossings.seen) <= 2


def test_texts_are_made_of_sentences_on_the_device():
    words = Dictionary(["a"] * 9, torch.empty(9, 5, device="meta"), terms=3)
    with Crossings() as crossings:
        assert words.project(torch.empty(4, 5, device="meta")).shape == (4, 5)
    assert crossings.seen == []


def test_augmenting_cached_pictures_copies_nothing(monkeypatch):
    """A tensor that is made from numbers on a card is a copy that the host waits for; grids are made once."""
    augment, made, tensor = Augment(28), [], torch.tensor
    images = torch.zeros(6, 3, 28, 28, dtype=torch.uint8, device="meta")
    for operation in augment.operations[4:]:
        operation(images)
    monkeypatch.setattr(torch, "tensor", lambda *args, **kwargs: made.append(args) or tensor(*args, **kwargs))
    with Crossings() as crossings:
        for operation in augment.operations[4:]:
            operation(images)
    assert crossings.seen == made == []


def test_crossings_and_questions_are_noticed():
    value, numbers = torch.ones(3, device="meta"), torch.zeros(3)
    with Crossings() as crossings:
        numbers.to("meta")
        value[torch.tensor([0, 2])]
    assert [name for name, _ in crossings.seen] == [INDICES[0], "aten.index.Tensor"] and INDICES not in crossings.seen
    with pytest.raises((RuntimeError, NotImplementedError)):
        value.sum().item()
    with pytest.raises((RuntimeError, NotImplementedError)):
        value.nonzero()
