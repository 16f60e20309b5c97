"""The student and expert network: an image encoder, with a projection if wanted, and a projection of texts."""

import torch
import torch.nn.functional as F
from torch import nn

from data.errors import InputError
from networks.image_encoder import ImageEncoder
from networks.lora import Lora, add_lora, base_digest, reset_lora
from networks.loss import PairLoss

IMAGE, TEXT, LOSS = "image", "text", "loss"  # what a parameter belongs to, see `CLIPModel.towers`
BASE_SEED = 0  # of encoders without weights to load; what adapters of several experts share must not vary


class ProjectionHead(nn.Module):
    """Maps an encoder's output [B, D_in] to the space that both towers share [B, D].

    Linear, GELU, Linear, dropout, residual from the first linear's output, layer norm
    (Wu et al., TMLR 2024, and the authors' released code).
    """

    def __init__(self, in_dim: int, width: int, dropout: float = 0.1):
        super().__init__()
        self.projection = nn.Linear(in_dim, width)
        self.gelu = nn.GELU()
        self.fc = nn.Linear(width, width)
        self.dropout = nn.Dropout(dropout)
        self.layer_norm = nn.LayerNorm(width)

    def forward(self, embed):  # [B, D_in]
        projected = self.projection(embed)
        hidden = self.dropout(self.fc(self.gelu(projected)))
        return self.layer_norm(hidden + projected)  # [B, D]


class CLIPModel(nn.Module):
    """Two towers with L2-normalised features, and the loss of their pairs.

    The image tower is `image_encoder` and `image_projection`, the text tower `text_projection`; the frozen text encoder
    is not part of the model, its output is the input `text_embed`. What the loss learns, if anything, is `logit_scale`
    and `logit_bias`. With `bf16` the towers compute in bfloat16 where that is safe; parameters and features keep their
    type.
    """

    def __init__(
        self,
        image_encoder: ImageEncoder,
        text_projection: ProjectionHead,
        bf16: bool = False,
        image_projection: ProjectionHead | None = None,
        pair_loss: PairLoss | None = None,
    ):
        super().__init__()
        self.image_encoder = image_encoder
        self.image_projection = nn.Identity() if image_projection is None else image_projection
        self.text_projection = text_projection
        self.bf16 = bf16
        self.pair_loss = pair_loss or PairLoss()
        for name, value in self.pair_loss.logit.items():
            self.register_parameter(name, nn.Parameter(torch.tensor(value)))

    def embed_images(self, images):
        """The image encoder's output [B, D_enc] for pictures [B, 3, H, W], before the projection."""
        return self._compute(self.image_encoder, images)

    def encode_image(self, images):
        """Features [B, D] of pictures [B, 3, H, W], or of what `embed_images` gave for them [B, D_enc]."""
        image_embed = self.embed_images(images) if images.ndim == 4 else images
        return F.normalize(self._compute(self.image_projection, image_embed), dim=-1)

    def encode_text(self, text_embed):  # [B, D_text] -> [B, D]
        return F.normalize(self._compute(self.text_projection, text_embed), dim=-1)

    def _compute(self, module, inputs):
        with torch.autocast(inputs.device.type, torch.bfloat16, enabled=self.bf16):
            return module(inputs).to(inputs.dtype)

    def forward(self, images=None, text_embed=None):
        """Features of what is given; None for what is not."""
        image_features = None if images is None else self.encode_image(images)
        return image_features, None if text_embed is None else self.encode_text(text_embed)

    def loss(self, image_features, text_features, similarity=None):
        """The loss of B pairs, a scalar, see `PairLoss`."""
        logit = {name: getattr(self, name) for name in self.pair_loss.logit}
        return self.pair_loss(image_features, text_features, similarity, **logit)

    def towers(self) -> dict[str, str]:
        """To which tower each parameter belongs, by name: `IMAGE`, `TEXT`, or to neither, `LOSS`."""
        modules = {IMAGE: (self.image_encoder, self.image_projection), TEXT: (self.text_projection,)}
        of = {p: tower for tower in modules for module in modules[tower] for p in module.parameters()}
        return {name: of.get(p, LOSS) for name, p in self.named_parameters()}


def trained_parameters(model: CLIPModel) -> dict[str, nn.Parameter]:
    """The parameters that train, by name: what experts store, students move and matching compares."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def count_parameters(model: CLIPModel) -> dict[str, int | float]:
    """Numbers of trained and of full (without adapters) parameters, reduction in per cent; both towers, and image."""
    counts, towers = {}, model.towers()
    for tower, among in (("", {IMAGE, TEXT, LOSS}), ("image_", {IMAGE})):
        named = [(name, p) for name, p in model.named_parameters() if towers[name] in among]
        trained = sum(p.numel() for _, p in named if p.requires_grad)
        full = sum(p.numel() for name, p in named if ".parametrizations.weight.0." not in name)
        counts |= {f"{tower}parameters_trained": trained, f"{tower}parameters_full": full}
        counts[f"{tower}reduction_percent"] = round(100 * (1 - trained / full), 2)
    return counts


class ModelFactory:
    """Gives fresh models one after another without building or reading an encoder again.

    With pretrained weights every model starts at them and only the projections are drawn anew;
    without, the image encoder is drawn anew too. Frozen weights, all of them or those under adapters (`lora`), are
    always the same ones, drawn from a fixed seed if there are none to load; adapters are drawn anew.

    Args:
        build_encoder: function without arguments that returns an `ImageEncoder`.
        starts_pretrained: whether `build_encoder` always returns the same weights.
        text_dim: width of the text embeddings.
        image_trainable: whether the image encoder trains.
        device: where the models live.
        lora: how the image encoder is adapted; None trains its own weights.
        bf16: whether the models compute in bfloat16.
        image_projection: whether the image tower has a projection, which trains in any case.

    Attributes:
        base: digest of the frozen weights, None where the image encoder trains whole.

    Raises:
        InputError: `lora` does not fit the encoder, or the image tower shall not train.
    """

    def __init__(
        self,
        build_encoder,
        starts_pretrained,
        text_dim,
        image_trainable=True,
        device="cpu",
        lora: Lora | None = None,
        bf16: bool = False,
        image_projection: bool = False,
    ):
        if lora and not image_trainable:
            raise InputError("adapters train the image encoder; give either --lora_rank or --image_trainable False")
        self.build_encoder = build_encoder
        self.starts_pretrained = starts_pretrained or lora is not None or not image_trainable
        self.text_dim = text_dim
        self.image_trainable = image_trainable
        self.device = torch.device(device)
        self.lora, self.bf16, self.image_projection = lora, bf16, image_projection
        with torch.random.fork_rng():
            torch.manual_seed(BASE_SEED)
            self.encoder = self._build()
        self.base = base_digest(self.encoder) if lora or not image_trainable else None
        self.start = {name: value.clone() for name, value in self.encoder.state_dict().items()}

    @property
    def trains(self) -> str:
        """What trains in the image tower, for tables."""
        if not self.image_trainable:
            return "projections alone" if self.image_projection else "text projection alone"
        encoder = str(self.lora) if self.lora else "whole image encoder"
        return f"{encoder} and image projection" if self.image_projection else encoder

    def _build(self) -> ImageEncoder:
        encoder = self.build_encoder().requires_grad_(self.image_trainable)
        if self.lora:
            add_lora(encoder, self.lora)
        return encoder

    def fresh(self, seed: int, pair_loss: PairLoss | None = None) -> CLIPModel:
        """A model in its initial state for `seed`; `pair_loss` as of `CLIPModel`.

        It shares storage with the model given before.
        """
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            if self.starts_pretrained:
                self.encoder.load_state_dict(self.start)
                reset_lora(self.encoder)
            else:
                self.encoder = self._build()
            width = self.encoder.width
            of_text = ProjectionHead(self.text_dim, width)
            of_images = ProjectionHead(width, width) if self.image_projection else None
        model = CLIPModel(self.encoder, of_text, self.bf16, of_images, pair_loss)
        return model.to(self.device, memory_format=torch.channels_last).train()
