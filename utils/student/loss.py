"""The student's loss: the contrastive loss of a model as a function of the parameters that train."""

import copy
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.func import functional_call

from networks.clip_model import CLIPModel
from networks.derivatives.written_out import WrittenOut
from utils.sets import similarity_matrix

Parameters = dict[str, Tensor]


class StudentLoss:
    """The contrastive loss of `model` as a function of the parameters that train, in two parts.

    Args:
        embed: `frozen_encoder` of pictures that are not the model's own pixels; only where the encoder is frozen.
        alpha: α of the low-rank soft targets.
        blend_alpha: a student's step mixes each pair with another one of it: with one λ ~ Beta(α, α) and one
            permutation π, picture embeddings u and text embeddings become λ u_i + (1 − λ) u_π(i) before the heads
            (Zhang et al., "RepBlend", NeurIPS 2025). For a frozen encoder; 0 for none.

    Attributes:
        towers: of the parameters by name, see `CLIPModel.towers`.
        frozen_encoder: pictures as they are learned, pixels [B, 3, H, W] or weights [B, N] of mixtures, -> [B, D_enc],
            the part before all that trains; None if the encoder trains too. See `on_embeddings`.
    """

    def __init__(
        self,
        model: CLIPModel,
        alpha: float = 1.0,
        blend_alpha: float = 0.0,
        embed: Callable[[Tensor], Tensor] | None = None,
    ):
        self.model, self.alpha, self.blend_alpha = model, alpha, blend_alpha
        self.towers = model.towers()
        trains = any(p.requires_grad for p in model.image_encoder.parameters())
        self.frozen_encoder = None if trains else embed or model.embed_images
        self.image_draws = None

    def on_embeddings(self) -> "StudentLoss":
        """The same loss of pictures that went through `frozen_encoder` already, [B, D_enc] each."""
        inner, model = copy.copy(self), self.model
        inner.frozen_encoder = None
        # Without the encoder, whose every parameter each call would look at.
        inner.model = CLIPModel(
            torch.nn.Identity(), model.text_projection, model.bf16, model.image_projection, model.pair_loss
        )
        return inner

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
        logit = {name: params[name] for name in self.model.pair_loss.logit}
        return self.model.pair_loss(image_features, text_features, targets, **logit)

    def __call__(self, params: Parameters, images: Tensor, text_embed: Tensor, targets: Tensor | None = None) -> Tensor:
        if self.blend_alpha:
            images, text_embed = blend(images, text_embed, self.blend_alpha)
        return self.of_features(params, self.encode_image(params, images), text_embed, targets)


def _random_state(device: torch.device) -> Tensor:
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


def blend(image_embed: Tensor, text_embed: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    """Rows [B, D] of both mixed with those of another order by one λ ~ Beta(α, α), see `StudentLoss`."""
    concentration = torch.full((), alpha, dtype=image_embed.dtype, device=image_embed.device)
    # Validating its arguments, it would make the host wait for a GPU.
    weight = torch.distributions.Beta(concentration, concentration, validate_args=False).sample()
    order = torch.randperm(len(image_embed), device=image_embed.device)
    return tuple(torch.lerp(embed[order], embed, weight) for embed in (image_embed, text_embed))
