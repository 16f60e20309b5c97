"""Student steps with the graph of a few pairs at a time.

Notation as in utils/student/sweep.py; besides U the image features, J = ∂U/∂θ of the image tower.
"""

import random

import torch
from torch import Tensor

from utils import ranks
from utils.student.loss import Parameters
from utils.student.share import SharedSteps
from utils.student.steps import add_to, gradients, inner, vector_jacobian


def chunk_seed(seed: int, number: int) -> int:
    """Of a step's chunk. All its bits differ from those of others: a CPU's generator takes the low 32 alone."""
    return random.Random(f"{seed} {number}").getrandbits(63)


class ChunkedSteps(SharedSteps):
    """Student steps with the graph of only `size` pairs' image tower at a time; the same gradient for every `size`.

    Pairs meet in the loss through their features alone, so ℓ, the text tower and ∂ℓ/∂U are computed on all of them,
    and the image tower chunk by chunk. On the way back, with b of the image tower as bᵢ and that of the text tower
    as bₜ, the step's part is the derivative of s = −βᵢ ⟨Jbᵢ, ∂ℓ/∂U⟩ − βₜ ⟨bₜ, ∂ℓ/∂θₜ⟩:

    1. chunk by chunk, the derivative of Jᵀ(−βᵢ ∂ℓ/∂U) along bᵢ for θ, X, and for its vector, which is Jbᵢ;
    2. on the features, the derivative of s for θₜ, Y, S and U, where Jbᵢ is held fixed;
    3. chunk by chunk, what 2. gave for U goes through Jᵀ to θ and X.

    The features of the way forth are kept. Random numbers of the text tower depend on `seed` and the step,
    those of the image tower on the chunk's number in the step's whole batch too: with `unit` = `size` a rank takes
    whole chunks, and they are those of one process.
    """

    def __init__(self, *args, size: int, unit: int = 1):
        super().__init__(*args, unit=unit)
        self.size = size

    def gradient(self, step: int, params: Parameters) -> tuple[Tensor, list[Tensor]]:
        chunks = self._chunks(step) or [self.shares[step].rows]
        with torch.no_grad():
            features = torch.cat([self._encode(step, rows, params)[0] for rows in chunks])
        self.features.append(self.shares[step].collect(features))
        loss, (*text_grads, feature_grad), _ = self._head_graph(step, params, create_graph=False)
        image, _ = self._by_tower(params.values())
        image_grads = [torch.zeros_like(value) for value in image]
        for rows in self._chunks(step) if image else ():
            chunk_features, _ = self._encode(step, rows, params)
            add_to(image_grads, gradients(chunk_features, image, feature_grad[rows]))
            del chunk_features
        if image:
            ranks.add_up(image_grads)
        return loss, self._merged(image_grads, text_grads)

    def prepare(self, step: int, params: Parameters) -> None:
        pass

    def pull_back(self, step: int, params: Parameters, adjoint: list[Tensor], push: list[Tensor]) -> None:
        image_push, text_push = self._by_tower(push)
        loss_grads, leaves = self._head_graph(step, params, create_graph=True)[1:]
        text, inputs = leaves[: len(text_push)], leaves[len(text_push) :]
        *text_grads, feature_grad = (grad.detach() for grad in loss_grads)
        tangents, image_change = self._second_order(step, params, image_push, feature_grad)  # Jbᵢ [B, D]
        self.grads.syn_lr_img -= inner(tangents, feature_grad)
        tangents = self.shares[step].collect(tangents[self.shares[step].rows])
        for value, grad in zip(text_push, text_grads, strict=True):
            self.grads.syn_lr_txt -= inner(value, grad)
        vectors = [*(b * -self.pairs.syn_lr_txt for b in text_push), tangents * -self.pairs.syn_lr_img]
        asked = self._asked(step, text)
        change = vector_jacobian(loss_grads, [*asked, *inputs], vectors)
        text_change, (texts, feature_vectors, *similarity) = change[: len(asked)], change[len(asked) :]
        self._add_texts(step, texts, similarity)
        self.features.pop()
        self._first_order(step, params, image_change, feature_vectors)
        self._descend(adjoint, self._merged(image_change, text_change))

    def _second_order(self, step: int, params: Parameters, push: list[Tensor], feature_grad: Tensor):
        """Jbᵢ [B, D] and the part of 1. for θ; the part for X goes to `grads`."""
        image, _ = self._by_tower(params.values())
        asked = self._asked(step, image)
        tangents, change = torch.zeros_like(feature_grad), [torch.zeros_like(value) for value in asked]
        for rows in self._chunks(step) if image else ():
            vector = (feature_grad[rows] * -self.pairs.syn_lr_img).requires_grad_()
            features, images = self._encode(step, rows, params)
            grads = gradients(features, image, vector, create_graph=True)
            tangents[rows], images, *theta = vector_jacobian(grads, [vector, images, *asked], push)
            del features, grads
            add_to(change, theta)
            self.grads.image_syn.index_add_(0, self.batches[step][rows], images)
        return tangents, change

    def _first_order(self, step: int, params: Parameters, change: list[Tensor], vectors: Tensor) -> None:
        """Adds the part of 3. to `change` and `grads`."""
        asked = self._asked(step, self._by_tower(params.values())[0])
        for rows in self._chunks(step):
            features, images = self._encode(step, rows, params)
            images, *theta = gradients(features, [images, *asked], vectors[rows])
            del features
            add_to(change, theta)
            self.grads.image_syn.index_add_(0, self.batches[step][rows], images)

    def _chunks(self, step: int) -> list[slice]:
        """This rank's."""
        first, stop = self.shares[step].start, self.shares[step].start + self.shares[step].size
        return [slice(start, min(start + self.size, stop)) for start in range(first, stop, self.size)]

    def _encode(self, step: int, rows: slice, params: Parameters) -> tuple[Tensor, Tensor]:
        """Features of the chunk [C, D] and its images [C, 3, H, W], with the graph between if gradients are on."""
        torch.manual_seed(chunk_seed(self.seed + step, rows.start // self.size))
        images = self.pairs.image_syn[self.batches[step][rows]].requires_grad_(torch.is_grad_enabled())
        return self.loss_fn.encode_image(params, images), images

    def _head_graph(self, step: int, params: Parameters, create_graph: bool):
        """ℓ, its gradient for [θₜ…, U], and the leaves [θₜ…, Y, U, parts of S…], at the features of the way forth."""
        torch.manual_seed(self.seed + step)
        features = self.features[-1].detach().requires_grad_()
        text_embed = self.pairs.text_syn[self.batches[step]].requires_grad_(create_graph)
        _, text = self._by_tower(params.values())
        similarity = self._similarity(create_graph)
        with torch.enable_grad():
            loss = self.loss_fn.of_features(params, features, text_embed, *self._targets(step, similarity))
            grads = gradients(loss, [*text, features], create_graph=create_graph)
        return loss.detach(), grads, [*text, text_embed, features, *similarity]
