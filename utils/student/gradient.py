"""The gradient of the matching loss: of one segment or of the mean of several, whole, in chunks, over ranks.

Notation as in utils/student/sweep.py.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from data.errors import InputError
from utils import ranks
from utils.sets import Pairs
from utils.student.chunks import ChunkedSteps
from utils.student.embedded import EmbeddedPictures
from utils.student.heads import history_is_smaller, match_heads
from utils.student.loss import Parameters, StudentLoss
from utils.student.share import SharedSteps
from utils.student.steps import LEAST, Keep, WholeSteps
from utils.student.sweep import Matching, match


@dataclass(frozen=True)
class Segment:
    """A piece of an expert's trajectory, and what the student's steps from its start are made of.

    Attributes:
        start_epoch: s.
        start, target: the expert's parameters θ*_s and θ*_{s+R}, by name.
        batches: indices into the pairs for each step, see `draw_batches`.
        seed: of the random numbers in the student's steps.
    """

    start_epoch: int
    start: dict[str, Tensor]
    target: dict[str, Tensor]
    batches: list[Tensor]
    seed: int


def prepare(snapshot: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """The snapshot in the memory layout of the models, and where a GPU can fetch it without waiting."""
    snapshot = {n: v.to(memory_format=torch.channels_last) if v.ndim == 4 else v for n, v in snapshot.items()}
    return {n: v.pin_memory() for n, v in snapshot.items()} if device.type == "cuda" else snapshot


def to_device(snapshot: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    return {name: value.to(device, non_blocking=True) for name, value in snapshot.items()}


def matching_gradient(
    loss_fn: StudentLoss,
    start: Parameters,
    target: Parameters,
    pairs: Pairs,
    batches: Sequence[Tensor],
    seed: int,
    pair_chunk: int | None = None,
    momentum: float = 0.0,
    adjoint_decay: float = 1.0,
    keep: Keep = LEAST,
) -> Matching:
    """The matching loss after T = len(batches) student steps, and its exact gradient in the memory of a step or more.

    How it is taken, see `match`. For a frozen image encoder see `mean_matching` and, of heads, utils/student/heads.py.

    Ranks share the pairs of each step (of a frozen image encoder, the pictures) and return the same gradient. With an
    image tower that draws random numbers their shares are whole chunks of `pair_chunk`, so that the numbers are those
    of one process with the same `pair_chunk`; with any other tower the shares are equal and `pair_chunk` is a matter of
    each rank's memory.

    Args:
        loss_fn: the student's loss.
        start, target: the expert's parameters θ*_s and θ*_{s+R}, by name.
        pairs: the synthetic pairs, rates and soft targets; their tensors need no gradient flag.
        batches: indices into the pairs for each step, see `draw_batches`.
        seed: of the random numbers in the student's steps.
        pair_chunk: pairs whose image tower's graph is held at a time; None for all. Then a step's memory does not
            grow with its pairs, for about 1.4 times the operations (more time for small chunks).
        momentum: μ of the student's steps.
        adjoint_decay: γ in λ_t = λ_{t+1} − γ β (∂g_t/∂θ)ᵀ b_t; 1 is exact, 0 the gradient of TESLA (Cui et al., 2023).
        keep: what stays in the device's memory for the way back.

    Raises:
        InputError: several ranks, an image tower that draws random numbers, and no `pair_chunk` below a batch.
    """
    pairs = Pairs.of(tensor.detach() for tensor in pairs.tensors())
    if loss_fn.frozen_encoder is not None:
        segment = Segment(0, start, target, batches, seed)
        return mean_matching(loss_fn, [segment], pairs, pair_chunk, momentum, adjoint_decay, keep)
    arguments = loss_fn, list(start), pairs, batches, seed, adjoint_decay
    batch_size = max(len(batch) for batch in batches)
    unit = check_shares(loss_fn, start, pairs, batch_size, pair_chunk)
    in_chunks = unit is not None or (pair_chunk is not None and pair_chunk < -(-batch_size // ranks.count()))
    if in_chunks:
        steps = ChunkedSteps(*arguments, size=pair_chunk, unit=unit or 1)
    else:
        whole = WholeSteps if ranks.count() == 1 else SharedSteps
        steps = whole(*arguments, keep.graphs)
    return match(steps, start, target, momentum, keep.params)


def mean_matching(
    loss_fn: StudentLoss,
    segments: Sequence[Segment],
    pairs: Pairs,
    pair_chunk: int | None = None,
    momentum: float = 0.0,
    adjoint_decay: float = 1.0,
    keep: Keep = LEAST,
) -> Matching:
    """The mean over `segments` of the matching loss, the student's losses and the gradient; see `matching_gradient`.

    Where the student's image encoder is frozen, each picture of any segment goes through it once, the steps and the
    sweeps run on its output, and one more pass, `pair_chunk` pictures at a time, takes the gradient to the pixels: then
    further segments cost little. Of what trains no weights are stored where the rows of all steps are smaller.
    """
    pairs = Pairs.of(tensor.detach() for tensor in pairs.tensors())
    how = momentum, adjoint_decay, keep
    if loss_fn.frozen_encoder is None:
        return _mean((_matched(segment, loss_fn, pairs, pair_chunk, *how) for segment in segments), len(segments))
    used = torch.cat([batch for segment in segments for batch in segment.batches])
    pictures = EmbeddedPictures(loss_fn.frozen_encoder, pairs.image_syn, used, pair_chunk, segments[0].seed)
    embedded, heads = replace(pairs, image_syn=pictures.embed), loss_fn.on_embeddings()
    with ranks.alone():
        matching = _mean((_heads_matched(segment, heads, embedded, *how) for segment in segments), len(segments))
    image_syn, *others = matching.gradient.tensors()
    ranks.take_from_first(others)
    matching.gradient.image_syn = pictures.pixels_gradient(image_syn)
    return matching


def mean_over_encoders(matchings: Mapping[int, Matching], number: int) -> Matching:
    """The mean of what several encoders gave for the same pairs; the gradient of each one's rates stays its own.

    Args:
        matchings: by the encoder's place among the `number` rates of the pairs; rates of others get 0. Of one encoder
            in all, its own matching.
    """
    if number == 1:
        return matchings[0]
    rates = {}
    for name in ("syn_lr_img", "syn_lr_txt"):
        of_one = {place: getattr(matching.gradient, name) / len(matchings) for place, matching in matchings.items()}
        nothing = torch.zeros_like(next(iter(of_one.values())))
        rates[name] = torch.stack([of_one.get(place, nothing) for place in range(number)])
    mean = _mean(iter(matchings.values()), len(matchings))
    return replace(mean, gradient=replace(mean.gradient, **rates))


def pulled_back(matching: Matching, pictures: Tensor, learned: Tensor) -> Matching:
    """The gradient of `learned` in the place of that of `pictures`, which were made from it with a graph, used up."""
    if pictures is learned:
        return matching
    (image_syn,) = torch.autograd.grad(pictures, learned, matching.gradient.image_syn)
    ranks.take_from_first([image_syn])  # a GPU's sums may differ in the last bit
    return replace(matching, gradient=replace(matching.gradient, image_syn=image_syn))


def _matched(segment: Segment, loss_fn: StudentLoss, pairs: Pairs, *how) -> Matching:
    return matching_gradient(loss_fn, *_ends(segment, pairs), pairs, segment.batches, segment.seed, *how)


def _heads_matched(segment: Segment, loss_fn: StudentLoss, pairs: Pairs, *how) -> Matching:
    if not history_is_smaller(loss_fn, segment.start, segment.batches):
        return _matched(segment, loss_fn, pairs, None, *how)
    momentum, adjoint_decay, _ = how
    ends = _ends(segment, pairs)
    return match_heads(loss_fn, *ends, pairs, segment.batches, segment.seed, momentum, adjoint_decay)


def _ends(segment: Segment, pairs: Pairs) -> list[Parameters]:
    return [to_device(snapshot, pairs.image_syn.device) for snapshot in (segment.start, segment.target)]


def _mean(matchings: Iterable[Matching], number: int) -> Matching:
    sums = None
    for matching in matchings:
        losses = matching.loss, matching.image_loss, matching.text_loss, matching.student_losses
        tensors = [*losses, *matching.gradient.tensors()]
        if sums is None:
            sums = tensors
        else:
            torch._foreach_add_(sums, tensors)
    torch._foreach_div_(sums, number)
    return Matching(*sums[:4], Pairs.of(sums[4:]))


def check_shares(loss_fn, params: Parameters, pairs: Pairs, batch_size: int, pair_chunk: int | None) -> int | None:
    """How many pairs a rank must take together: `pair_chunk` if the image tower draws random numbers, else None.

    Raises:
        InputError: see `matching_gradient`.
    """
    if ranks.count() == 1 or loss_fn.frozen_encoder is not None:
        return None
    if not loss_fn.draws_on_images(params, pairs.image_syn):
        return None
    if pair_chunk is None or pair_chunk >= batch_size:
        raise InputError(
            "the image tower draws random numbers (dropout), so ranks share whole chunks of pairs; give --pair_chunk "
            f"{-(-batch_size // ranks.count())} or less, the same with any number of ranks"
        )
    return pair_chunk
