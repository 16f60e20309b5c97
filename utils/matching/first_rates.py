"""First values of the student's learned rates that fit what trains, the encoders and the data."""

import bisect
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace

import torch

from networks.clip_model import IMAGE, TEXT
from utils import ranks
from utils.sets import Pairs
from utils.student import Segment, StudentLoss, matching_loss, mean_matching
from utils.student.embedded import EmbeddedPictures

FIT = "fit"  # in the place of a first rate, see `fit_first_rates`
RATES = [10 ** (step / 8) for step in range(-40, 9)]  # 1e-5 to 10
MARGIN = 1.05  # of the matching loss of students that stay put


def fit_first_rates(
    loss_fn: StudentLoss,
    segments: Sequence[Segment],
    pairs: Pairs,
    names: Sequence[str],
    pair_chunk: int | None = None,
    **student,
) -> dict[str, float]:
    """First rates by name, the largest of `RATES` at which students on the first pairs do not go astray.

    Astray is a mean matching loss over `segments` above `MARGIN` times that of students that stay put. With larger
    rates the first gradients explode, with smaller ones the students hardly move. Two rates are raised together as far
    as they can be, then each by itself: a whole image encoder bears far less than a projection of texts.

    Args:
        names: of the rates to fit, "syn_lr_img" or "syn_lr_txt" or both; the other one keeps its value.
        pair_chunk, student: see `matching_gradient`.
    """
    still = (sum(matching_loss(s.start, s.start, s.target, loss_fn.towers)) for s in segments)
    staying = sum(still).item() / len(segments)
    is_embedded = loss_fn.frozen_encoder is not None
    if is_embedded:
        used = torch.cat([batch for segment in segments for batch in segment.batches])
        pictures = EmbeddedPictures(loss_fn.frozen_encoder, pairs.image_syn, used, pair_chunk, segments[0].seed)
        pairs, loss_fn = replace(pairs, image_syn=pictures.embed), loss_fn.on_embeddings()

    def go_astray(rates: dict[str, float]) -> bool:
        tensors = {name: torch.full_like(getattr(pairs, name), rate) for name, rate in rates.items()}
        with ranks.alone() if is_embedded else nullcontext():
            loss = mean_matching(loss_fn, segments, replace(pairs, **tensors), pair_chunk, **student).loss
        ranks.take_from_first([loss])
        return not loss <= MARGIN * staying  # so that one that is not a number goes astray

    def raised(rates: dict[str, float], names: Sequence[str]) -> dict[str, float]:
        higher = [{**rates, **dict.fromkeys(names, rate)} for rate in RATES if rate >= rates.get(names[0], 0)]
        return higher[max(0, bisect.bisect_left(higher, True, key=go_astray) - 1)]

    rates = raised({}, names)
    if len(names) > 1:
        training = {loss_fn.towers[name] for name in segments[0].start}
        for name, tower in (("syn_lr_img", IMAGE), ("syn_lr_txt", TEXT)):
            if tower in training:  # no rate is too large for a tower that does not train
                rates = raised(rates, [name])
    return rates
