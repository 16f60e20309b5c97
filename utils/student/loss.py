"""The student: its loss, and the gradient of one of its steps and back through it, whole or in chunks of pairs.

Notation as in utils/student/sweep.py; besides U the image features, J = ∂U/∂θ of the image tower.

Over ranks, each computes the image tower of its share of a step's pairs, and everything behind U for all of them.
Forth, a step gathers U and sums the image tower's part of g_t; back, it gathers Jb and sums the image tower's part of
λ_t while the next graph is built. What the pixels and the image rate get is summed once at the end.
"""

import random
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.func import functional_call

from networks.clip_model import IMAGE_TOWER
from networks.derivatives.written_out import WrittenOut
from networks.loss import pair_loss
from utils import ranks
from utils.sets import rows_on, similarity_matrix
from utils.student.share import Share

Parameters = dict[str, Tensor]


class StudentLoss:
    """The contrastive loss of `model` as a function of the parameters that train, in two parts.

    Args:
        loss_type: see `pair_loss`.
        alpha: α of the low-rank soft targets.
        blend_alpha: a student's step mixes each pair with another one of it: with one λ ~ Beta(α, α) and one
            permutation π, picture embeddings u and text embeddings become λ u_i + (1 − λ) u_π(i) before the heads
            (Zhang et al., "RepBlend", NeurIPS 2025). For a frozen encoder; 0 for none.

    Attributes:
        frozen_encoder: pictures [B, 3, H, W] -> [B, D_enc], the part before all that trains; None if it trains too.
            What it gives may then stand in the place of pictures everywhere here.
    """

    def __init__(
        self, model, temperature: float, loss_type: str = "InfoNCE", alpha: float = 1.0, blend_alpha: float = 0.0
    ):
        self.model, self.temperature, self.loss_type, self.alpha = model, temperature, loss_type, alpha
        self.blend_alpha = blend_alpha
        trains = any(p.requires_grad for p in model.image_encoder.parameters())
        self.frozen_encoder = None if trains else model.embed_images
        self.image_draws = None

    def draws_on_images(self, params: Parameters, images: Tensor) -> bool:
        """Whether the image tower draws random numbers (dropout), as it did for the first of `images` once."""
        if self.image_draws is None:
            state = _random_state(images.device)
            with torch.random.fork_rng(), torch.no_grad():
                self.encode_image(params, images[:1])
                self.image_draws = not torch.equal(state, _random_state(images.device))
        return self.image_draws

    def encode_image(self, params: Parameters, images: Tensor) -> Tensor:
        """Features [B, D] of images [B, 3, H, W], each a function of its own image alone."""
        with WrittenOut():
            return functional_call(self.model, params, (images, None))[0]

    def targets(self, similarity: Sequence[Tensor], rows: Tensor) -> Tensor:
        """The soft targets [B, B] of a step's pairs, from the parts of S."""
        return similarity_matrix(tuple(similarity), self.alpha, rows)

    def of_features(
        self, params: Parameters, image_features: Tensor, text_embed: Tensor, targets: Tensor | None = None
    ) -> Tensor:
        """The loss, a scalar, of image features [B, D], text embeddings [B, D_text] and soft targets [B, B]."""
        text_features = functional_call(self.model, params, (None, text_embed))[1]
        return pair_loss(image_features, text_features, self.temperature, self.loss_type, targets)

    def __call__(self, params: Parameters, images: Tensor, text_embed: Tensor, targets: Tensor | None = None) -> Tensor:
        if self.blend_alpha:
            images, text_embed = blend(images, text_embed, self.blend_alpha)
        return self.of_features(params, self.encode_image(params, images), text_embed, targets)


def chunk_seed(seed: int, number: int) -> int:
    """Of a step's chunk. All its bits differ from those of others: a CPU's generator takes the low 32 alone."""
    return random.Random(f"{seed} {number}").getrandbits(63)


def _random_state(device: torch.device) -> Tensor:
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


def blend(image_embed: Tensor, text_embed: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    """Rows [B, D] of both mixed with those of another order by one λ ~ Beta(α, α), see `StudentLoss`."""
    concentration = torch.full((), alpha, dtype=image_embed.dtype, device=image_embed.device)
    # Validating its arguments, it would make the host wait for a GPU.
    weight = torch.distributions.Beta(concentration, concentration, validate_args=False).sample()
    order = torch.randperm(len(image_embed), device=image_embed.device)
    return tuple(torch.lerp(embed[order], embed, weight) for embed in (image_embed, text_embed))


class WholeSteps:
    """Student steps with all their pairs in one graph, the last of which is kept from the way forth.

    Args:
        loss_fn: the student's loss.
        names: of the parameters.
        pairs: the synthetic pairs, rates and soft targets.
        batches: indices of each step's pairs.
        seed: of the random numbers; step t depends on `seed` and t alone.
        adjoint_decay: γ of `pull_back`.
        unit: a rank's share of a step's pairs is of whole blocks of so many.

    Attributes:
        grads: ∂L/∂ every tensor of the pairs, filled by `pull_back`; over ranks when `finish` has been called.
    """

    def __init__(
        self,
        loss_fn,
        names: Sequence[str],
        pairs,
        batches: Sequence[Tensor],
        seed: int,
        adjoint_decay: float,
        unit: int = 1,
    ):
        self.loss_fn, self.pairs, self.seed, self.adjoint_decay = loss_fn, pairs, seed, adjoint_decay
        self.shares = [Share(len(batch), unit) for batch in batches]
        self.features = []  # U of each step [B, D], where it is wanted again
        self.batches = rows_on(pairs.image_syn.device, batches)
        self.is_image = [name.startswith(IMAGE_TOWER) for name in names]
        self.rates = [pairs.syn_lr_img if image else pairs.syn_lr_txt for image in self.is_image]
        self.grads = [torch.zeros_like(tensor) for tensor in pairs.tensors()]
        self.kept, self.unsettled = None, None

    def gradient(self, step: int, params: Parameters) -> tuple[Tensor, list[Tensor]]:
        """ℓ and g_t at `params`."""
        is_last = step == len(self.batches) - 1
        loss, grads, leaves = self._graph(step, params, create_graph=is_last)
        if is_last:
            self.kept = grads, leaves
        return loss, self._summed([grad.detach() for grad in grads])

    def prepare(self, step: int, params: Parameters) -> None:
        """What `pull_back` of this step can begin with while `settle` would have to wait."""
        self.kept = self.kept or self._graph(step, params, create_graph=True)[1:]

    def settle(self) -> None:
        """Completes the λ that `pull_back` was given last."""
        if self.unsettled is not None:
            self.unsettled()
        self.unsettled = None

    def finish(self) -> None:
        """Completes `grads`: of pixels and image rate each rank has a part, all else every rank has whole."""
        ranks.add_up([self.grads[0], self.grads[2]])()
        ranks.take_from_first([self.grads[1], *self.grads[3:]])

    def pull_back(self, step: int, params: Parameters, adjoint: list[Tensor], push: list[Tensor]) -> None:
        """Adds −γ β (∂g_t/∂θ)ᵀ b to λ in place, and what step t gives to `grads`; `push` is b, which may be λ itself.

        To be called after `prepare`. λ_0 is asked of nobody: step 0 leaves λ as it is.
        """
        (grads, leaves), self.kept = self.kept, None
        for is_image, value, grad in zip(self.is_image, push, grads, strict=True):
            self.grads[2 if is_image else 3] -= _inner(value, grad)
        vectors = torch._foreach_mul(push, self.rates)
        torch._foreach_neg_(vectors)
        params, inputs = leaves[: len(vectors)], leaves[len(vectors) :]
        asked = self._asked(step, params)
        change = _vector_jacobian(grads, [*asked, *inputs], vectors)
        theta, (images, texts, *similarity) = change[: len(asked)], change[len(asked) :]
        self._descend(adjoint, theta)
        self.grads[0].index_add_(0, self.batches[step][self.shares[step].rows], images)
        self._add_texts(step, texts, similarity)

    def _asked(self, step: int, params: list[Tensor]) -> list[Tensor]:
        """The parameters that λ_t needs the step's derivative for: all or none."""
        return params if step > 0 and self.adjoint_decay > 0 else []

    def _descend(self, adjoint: list[Tensor], theta: list[Tensor]) -> None:
        """Adds the change of λ, over ranks when `settle` is called: till then it is summed."""
        if not theta:
            return
        image, _ = self._by_tower(theta)
        wait = ranks.add_up(image) if image else None

        def add() -> None:
            if wait:
                wait()
            torch._foreach_add_(adjoint, theta, alpha=self.adjoint_decay)

        self.unsettled = add
        if ranks.count() == 1:
            self.settle()

    def _summed(self, grads: list[Tensor]) -> list[Tensor]:
        """Gradients of the parameters, of which each rank has a part for the image tower and all for the text tower."""
        if ranks.count() == 1 or not any(self.is_image):
            return grads
        grads = [grad.clone() if is_image else grad for is_image, grad in zip(self.is_image, grads, strict=True)]
        ranks.add_up(self._by_tower(grads)[0])()
        return grads

    def _by_tower(self, values) -> tuple[list[Tensor], list[Tensor]]:
        both = list(zip(self.is_image, values, strict=True))
        return [value for image, value in both if image], [value for image, value in both if not image]

    def _merged(self, image: Sequence[Tensor], text: Sequence[Tensor]) -> list[Tensor]:
        """The inverse of `_by_tower`; nothing of nothing."""
        image, text = list(image), list(text)
        return [(image if is_image else text).pop(0) for is_image in self.is_image if image or text]

    def _add_texts(self, step: int, texts: Tensor, similarity: Sequence[Tensor]) -> None:
        self.grads[1].index_add_(0, self.batches[step], texts)
        _add(self.grads[4:], similarity)

    def _similarity(self, requires_grad: bool) -> list[Tensor]:
        return [part.detach().requires_grad_(requires_grad) for part in self.pairs.similarity]

    def _targets(self, step: int, similarity: list[Tensor]) -> list[Tensor]:
        return [self.loss_fn.targets(similarity, self.batches[step])] if similarity else []

    def _graph(self, step: int, params: Parameters, create_graph: bool):
        torch.manual_seed(self.seed + step)
        images = self.pairs.image_syn[self.batches[step][self.shares[step].rows]].requires_grad_(create_graph)
        text_embed = self.pairs.text_syn[self.batches[step]].requires_grad_(create_graph)
        similarity = self._similarity(create_graph)
        with torch.enable_grad():
            inputs = images, text_embed, *self._targets(step, similarity)
            loss = self.loss_fn(params, *inputs) if ranks.count() == 1 else self._shared_loss(step, params, *inputs)
            grads = _gradients(loss, list(params.values()), create_graph=create_graph)
        return loss.detach(), grads, [*params.values(), images, text_embed, *similarity]

    def _shared_loss(self, step: int, params: Parameters, images: Tensor, *others: Tensor) -> Tensor:
        """ℓ of all pairs from this rank's images. The features of the way forth are kept for the way back."""
        is_back = step < len(self.features)
        own = self.loss_fn.encode_image(params, images)
        features = self.shares[step].gather(own, self.features[step] if is_back else None)
        if not is_back:
            self.features.append(features.detach())
        return self.loss_fn.of_features(params, features, *others)


class ChunkedSteps(WholeSteps):
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
        super().__init__(*args, unit)
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
            _add(image_grads, _gradients(chunk_features, image, feature_grad[rows]))
            del chunk_features
        if image:
            ranks.add_up(image_grads)()
        return loss, self._merged(image_grads, text_grads)

    def prepare(self, step: int, params: Parameters) -> None:
        pass

    def pull_back(self, step: int, params: Parameters, adjoint: list[Tensor], push: list[Tensor]) -> None:
        image_push, text_push = self._by_tower(push)
        loss_grads, leaves = self._head_graph(step, params, create_graph=True)[1:]
        text, inputs = leaves[: len(text_push)], leaves[len(text_push) :]
        *text_grads, feature_grad = (grad.detach() for grad in loss_grads)
        tangents, image_change = self._second_order(step, params, image_push, feature_grad)  # Jbᵢ [B, D]
        self.grads[2] -= _inner(tangents, feature_grad)
        tangents = self.shares[step].collect(tangents[self.shares[step].rows])
        for value, grad in zip(text_push, text_grads, strict=True):
            self.grads[3] -= _inner(value, grad)
        vectors = [*(b * -self.pairs.syn_lr_txt for b in text_push), tangents * -self.pairs.syn_lr_img]
        asked = self._asked(step, text)
        change = _vector_jacobian(loss_grads, [*asked, *inputs], vectors)
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
            grads = _gradients(features, image, vector, create_graph=True)
            tangents[rows], images, *theta = _vector_jacobian(grads, [vector, images, *asked], push)
            del features, grads
            _add(change, theta)
            self.grads[0].index_add_(0, self.batches[step][rows], images)
        return tangents, change

    def _first_order(self, step: int, params: Parameters, change: list[Tensor], vectors: Tensor) -> None:
        """Adds the part of 3. to `change` and `grads`."""
        asked = self._asked(step, self._by_tower(params.values())[0])
        for rows in self._chunks(step):
            features, images = self._encode(step, rows, params)
            images, *theta = _gradients(features, [images, *asked], vectors[rows])
            del features
            _add(change, theta)
            self.grads[0].index_add_(0, self.batches[step][rows], images)

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
            grads = _gradients(loss, [*text, features], create_graph=create_graph)
        return loss.detach(), grads, [*text, text_embed, features, *similarity]


def _gradients(output: Tensor, inputs: Sequence[Tensor], vector: Tensor | None = None, create_graph: bool = False):
    return torch.autograd.grad(
        output, inputs, vector, create_graph=create_graph, allow_unused=True, materialize_grads=True
    )


def _vector_jacobian(outputs: Sequence[Tensor], inputs: Sequence[Tensor], vectors: Sequence[Tensor]):
    """Σ ∂⟨vector, output⟩/∂input over the outputs; those that depend on no input are left out."""
    used = [(output, vector) for output, vector in zip(outputs, vectors, strict=True) if output.requires_grad]
    outputs, vectors = zip(*used, strict=True)
    return torch.autograd.grad(outputs, inputs, vectors, allow_unused=True, materialize_grads=True)


def _inner(left: Tensor, right: Tensor) -> Tensor:
    return torch.sum(left.detach() * right.detach())


def _add(into: list[Tensor], values: Sequence[Tensor]) -> None:
    if into:
        torch._foreach_add_(into, values)
