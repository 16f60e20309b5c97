"""Choosing real pairs: random, herding, k-center, k-means, prototypes and forgetting, each picture at most once.

Rows are pairs, one per caption; `groups` names each row's picture, int64 [N]. Once a row is chosen, the other
rows of its picture are out. Every function returns the chosen rows in the order of choice and a score for each.
"""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor
from tqdm import tqdm

from data.errors import InputError
from utils.forms.features import BLOCK, PairFeatures

Choice = tuple[list[int], list[float]]


def check_num_queries(num_queries: int, num_pictures: int) -> None:
    """Raises InputError if there are fewer pictures than pairs to choose."""
    if num_queries > num_pictures:
        raise InputError(f"--num_queries {num_queries} is more than the {num_pictures} training pictures; lower it")


def random_rows(groups: Tensor, num: int, generator: torch.Generator) -> list[int]:
    """`num` distinct pictures and of each a random caption: rows. `groups` numbers the pictures from 0, in order."""
    starts = torch.cat([torch.zeros(1, dtype=torch.long), torch.bincount(groups).cumsum(0)])
    pictures = torch.randperm(len(starts) - 1, generator=generator)[:num].tolist()
    sizes = [(starts[p + 1] - starts[p]).item() for p in pictures]
    offsets = [torch.randint(size, (), generator=generator).item() for size in sizes]
    return [starts[p].item() + offset for p, offset in zip(pictures, offsets, strict=True)]


def herding(features: PairFeatures, groups: Tensor, num: int) -> Choice:
    """Greedy matching of the mean (Welling, "Herding dynamical weights to learn", ICML 2009).

    With μ the mean of all rows and S the sum of those chosen, step t takes the x that brings the chosen rows' mean
    (S + x) / t nearest to μ. For features of one norm, as `pair_features` gives, that is Welling's
    argmax ⟨w, x⟩ with w = tμ − S.

    Args:
        features: [N, D]; read once per step, no memory beyond O(N + D).

    Returns:
        (rows, scores): a row's score is the distance of the chosen rows' mean from μ after it was added.
    """
    check_num_queries(num, len(groups.unique()))
    mean = features.mean()  # [D]
    half_norms = features.squared_norms() / 2  # [N]
    total = torch.zeros_like(mean)
    rows, scores = [], []
    for t in range(1, num + 1):
        # ‖tμ − S − x‖² / 2 without its constant, with the sign turned
        gain = features.products(t * mean - total) - half_norms
        row = _take(gain, half_norms, groups)
        total += features[row]
        rows.append(row)
        scores.append((mean - total / t).norm().item())
    return rows, scores


def kcenter(features: PairFeatures, groups: Tensor, num: int) -> Choice:
    """Greedy farthest point (Sener & Savarese, "A core-set approach", ICLR 2018).

    The first centre is the row nearest to the mean of all rows; each next one is the row farthest from its nearest
    centre. Only each row's distance to its nearest centre is kept.

    Args:
        features: [N, D]; read once per step, no memory beyond O(N + D).

    Returns:
        (rows, scores): a row's score is its distance to the nearest earlier centre; the first one's, to the mean.
    """
    check_num_queries(num, len(groups.unique()))
    norms = features.squared_norms()  # [N]
    to_mean = _squared_distances(features, norms, features.mean())
    out = torch.zeros_like(norms)  # inf at rows whose picture is taken
    rows = [_take(-to_mean, out, groups)]
    scores = [to_mean[rows[0]].sqrt().item()]
    nearest = _squared_distances(features, norms, features[rows[0]])
    while len(rows) < num:
        row = _take(nearest - out, out, groups)
        rows.append(row)
        scores.append(nearest[row].sqrt().item())
        nearest = torch.minimum(nearest, _squared_distances(features, norms, features[row]))
    return rows, scores


def kmeans(
    features: PairFeatures, groups: Tensor, num: int, generator: torch.Generator, most_rounds: int = 100
) -> Choice:
    """The rows nearest to the `num` centres of `clusters`.

    Centres choose in the order of their seeds, each the nearest row whose picture is not yet taken.

    Returns:
        (rows, scores): a row's score is its distance to its centre.
    """
    return _nearest_rows(features, groups, clusters(features, groups, num, generator, most_rounds)[0])


def prototypes(
    features: PairFeatures, groups: Tensor, num: int, generator: torch.Generator, text_embed: Tensor
) -> tuple[Choice, Tensor]:
    """The rows that `kmeans` chooses, and for each the mean text of its cluster (after PDS, Choi et al., ICLR 2026).

    Args:
        text_embed: [N, D_text], of each row's caption.

    Returns:
        (rows, scores) as of `kmeans`, and means [num, D_text], float32: of the text_embed of all rows of the row's
        cluster, each weighing the same; of a cluster that is empty, the row's own.
    """
    centres, cluster = clusters(features, groups, num, generator)
    rows, scores = _nearest_rows(features, groups, centres)
    counts = torch.bincount(cluster, minlength=num)[:, None]
    sums = torch.zeros(num, text_embed.shape[1], dtype=torch.double)
    for own, texts in zip(cluster.split(BLOCK), text_embed.split(BLOCK), strict=True):
        sums.index_add_(0, own, texts.double())
    means = torch.where(counts > 0, sums / counts.clamp(min=1), text_embed[rows].double())
    return (rows, scores), means.float()


def clusters(
    features: PairFeatures, groups: Tensor, num: int, generator: torch.Generator, most_rounds: int = 100
) -> tuple[Tensor, Tensor]:
    """`num` clusters of k-means (Lloyd, from the seeds of `spread_seeds`).

    The rounds end when no row changes its centre, or after `most_rounds`. A centre that no row is nearest to stays
    where it is.

    Args:
        features: [N, D]; read once per round, no memory beyond O(N + (block + num) D).

    Returns:
        centres [num, D], in the order of their seeds, and each row's cluster, int64 [N]: a centre is the mean of its
        cluster's rows.
    """
    check_num_queries(num, len(groups.unique()))
    norms = features.squared_norms()  # [N]
    centres = features[spread_seeds(features, norms, num, generator)]  # [K, D]
    nearest = None
    for _ in tqdm(range(most_rounds), desc="k-means", leave=False, disable=None):
        before, nearest = nearest, _nearest_centres(features, centres)
        if before is not None and torch.equal(before, nearest):
            break
        counts = torch.bincount(nearest, minlength=num)[:, None]
        centres = torch.where(counts > 0, features.sums(nearest, num) / counts.clamp(min=1), centres)
    return centres, nearest


def _nearest_rows(features: PairFeatures, groups: Tensor, centres: Tensor) -> Choice:
    """For each centre [K, D] the nearest row whose picture is not yet taken, and its distance."""
    norms = features.squared_norms()  # [N]
    out = torch.zeros_like(norms)  # inf at rows whose picture is taken
    rows, scores = [], []
    for centre in centres:
        distances = _squared_distances(features, norms, centre)
        rows.append(_take(-distances - out, out, groups))
        scores.append(distances[rows[-1]].sqrt().item())
    return rows, scores


def spread_seeds(features: PairFeatures, norms: Tensor, num: int, generator: torch.Generator) -> list[int]:
    """`num` rows of features [N, D], each drawn with its squared distance to the nearest one drawn before as weight.

    These are the seeds of k-means++ (Arthur & Vassilvitskii, SODA 2007); the first has no preference. `norms` [N] are
    the rows' squared norms.
    """
    rows = [torch.randint(len(features), (), generator=generator).item()]
    nearest = _squared_distances(features, norms, features[rows[0]])
    while len(rows) < num:
        heaped = nearest.double().cumsum(dim=0)
        drawn = torch.rand((), generator=generator, dtype=torch.double) * heaped[-1]
        # Where all distances are 0 any row will do, here the last.
        rows.append(min(torch.searchsorted(heaped, drawn, right=True).item(), len(features) - 1))
        nearest = torch.minimum(nearest, _squared_distances(features, norms, features[rows[-1]]))
    return rows


def _nearest_centres(features: PairFeatures, centres: Tensor) -> Tensor:
    """The index [N] of the centre [K, D] nearest to each row."""
    half_norms = centres.square().sum(dim=1) / 2
    return torch.cat([(half_norms - rows.products(centres.T)).argmin(dim=1) for rows in features.blocks()])


def highest(scores: Tensor, groups: Tensor, num: int, generator: torch.Generator) -> Choice:
    """The rows with the highest scores [N], one per picture; rows of equal score in random order."""
    check_num_queries(num, len(groups.unique()))
    shuffled = torch.randperm(len(scores), generator=generator)
    order = shuffled[scores[shuffled].argsort(descending=True, stable=True)]
    rows, taken = [], set()
    for row, group in zip(order.tolist(), groups[order].tolist(), strict=True):
        if group not in taken:
            taken.add(group)
            rows.append(row)
            if len(rows) == num:
                break
    return rows, scores[rows].tolist()


def _squared_distances(features: PairFeatures, norms: Tensor, centre: Tensor) -> Tensor:
    """‖x − c‖² of each row [N]; rounding may leave a little below zero, which is cut off."""
    return (norms + centre.square().sum() - 2 * features.products(centre)).clamp_(min=0)


def _take(value: Tensor, penalty: Tensor, groups: Tensor) -> int:
    """The row of the highest value; sets the `penalty` of all rows of its picture to inf."""
    row = value.argmax().item()
    penalty[groups == groups[row]] = torch.inf
    return row


class ForgettingCounter:
    """Counts how often each pair is forgotten while a model trains (Toneva et al., ICLR 2019), for retrieval.

    A presentation of a pair is its place in one batch of one epoch, judged by the features of the training step
    itself (dropout on, before the update). The pair is matched if both ways hold within the batch: the text nearest
    to its image belongs to its picture, and the image nearest to its text is its picture. It is forgotten once for
    each presentation where it is not matched although it was at the presentation before. A pair that was never
    matched counts as many events as it had presentations, which is more than any other can reach: Toneva's infinity.

    Args:
        groups: each row's picture, int64 [N].
    """

    def __init__(self, groups: Tensor):
        self.groups = groups
        self.forgotten = torch.zeros(len(groups), dtype=torch.long)
        self.presented = torch.zeros(len(groups), dtype=torch.long)
        self.was_matched = torch.zeros(len(groups), dtype=torch.bool)
        self.learned = torch.zeros(len(groups), dtype=torch.bool)
        self.rows = None

    def watch(self, loader: Iterable) -> Iterator:
        """Passes on the batches (images, rows) and remembers the rows of the current one."""
        for images, rows in loader:
            self.rows = rows
            yield images, rows

    def count_batch(self, image_features: PairFeatures, text_features: PairFeatures) -> None:
        """Takes the features [B, D] of the current batch: `on_batch` of `train_epoch`."""
        similarity = image_features @ text_features.T  # [B, B]
        own = self.groups[self.rows]
        to_text, to_image = (own[similarity.argmax(dim=dim).cpu()] for dim in (1, 0))
        self.count(self.rows, (to_text == own) & (to_image == own))

    def count(self, rows: Tensor, matched: Tensor) -> None:
        """One presentation of each of `rows` [B]; `matched` bool [B]."""
        self.forgotten[rows] += self.was_matched[rows] & ~matched
        self.presented[rows] += 1
        self.was_matched[rows] = matched
        self.learned[rows] |= matched

    def scores(self) -> Tensor:
        """Events of each pair, float [N]; of pairs never matched, their presentations."""
        return torch.where(self.learned, self.forgotten, self.presented).float()
