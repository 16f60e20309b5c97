"""The student and expert network: an image encoder and a projection of frozen text embeddings."""

import torch
import torch.nn.functional as F
from torch import nn

from data.errors import InputError
from networks.image_encoder import ImageEncoder
from networks.lora import Lora, add_lora, base_digest, reset_lora

BASE_SEED = 0  # of encoders without weights to load; what adapters of several experts share must not vary


class ProjectionHead(nn.Module):
    """Maps a frozen text embedding [B, D_text] to image feature space [B, D_img].

    Linear, GELU, Linear, dropout, residual from the first linear's output, layer norm
    (Wu et al., TMLR 2024, and the authors' released code).
    """

    def __init__(self, text_dim: int, width: int, dropout: float = 0.1):
        super().__init__()
        self.projection = nn.Linear(text_dim, width)
        self.gelu = nn.GELU()
        self.fc = nn.Linear(width, width)
        self.dropout = nn.Dropout(dropout)
        self.layer_norm = nn.LayerNorm(width)

    def forward(self, text_embed):  # [B, D_text]
        projected = self.projection(text_embed)
        hidden = self.dropout(self.fc(self.gelu(projected)))
        return self.layer_norm(hidden + projected)  # [B, D_img]


class CLIPModel(nn.Module):
    """Two towers with L2-normalised features.

    The image tower's parameters are named `image_encoder.*`, the text tower's `text_projection.*`;
    the frozen text encoder is not part of the model, its output is the input `text_embed`.
    With `bf16` the towers compute in bfloat16 where that is safe; parameters and features keep their type.
    """

    def __init__(self, image_encoder: ImageEncoder, text_projection: ProjectionHead, bf16: bool = False):
        super().__init__()
        self.image_encoder = image_encoder
        self.text_projection = text_projection
        self.bf16 = bf16

    def encode_image(self, images):  # [B, 3, H, W] -> [B, D]
        return self._features(self.image_encoder, images)

    def encode_text(self, text_embed):  # [B, D_text] -> [B, D]
        return self._features(self.text_projection, text_embed)

    def _features(self, tower, inputs):
        with torch.autocast(inputs.device.type, torch.bfloat16, enabled=self.bf16):
            features = tower(inputs)
        return F.normalize(features.to(inputs.dtype), dim=-1)

    def forward(self, images=None, text_embed=None):
        """Features of what is given; None for what is not."""
        image_features = None if images is None else self.encode_image(images)
        return image_features, None if text_embed is None else self.encode_text(text_embed)


def trained_parameters(model: CLIPModel) -> dict[str, nn.Parameter]:
    """The parameters that train, by name: what experts store, students move and matching compares."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def count_parameters(model: CLIPModel) -> dict[str, int | float]:
    """Numbers of trained and of full (without adapters) parameters, reduction in per cent; both towers, and image."""
    counts = {}
    for tower, prefix in (("", ""), ("image_", "image_encoder.")):
        named = [(name, p) for name, p in model.named_parameters() if name.startswith(prefix)]
        trained = sum(p.numel() for _, p in named if p.requires_grad)
        full = sum(p.numel() for name, p in named if ".parametrizations.weight.0." not in name)
        counts |= {f"{tower}parameters_trained": trained, f"{tower}parameters_full": full}
        counts[f"{tower}reduction_percent"] = round(100 * (1 - trained / full), 2)
    return counts


class ModelFactory:
    """Gives fresh models one after another without building or reading an encoder again.

    With pretrained weights every model starts at them and only the text projection is drawn anew;
    without, the image encoder is drawn anew too. With `lora` the frozen weights are always the same ones (drawn
    from a fixed seed if there are none to load) and the adapters are drawn anew.

    Args:
        build_encoder: function without arguments that returns an `ImageEncoder`.
        starts_pretrained: whether `build_encoder` always returns the same weights.
        text_dim: width of the text embeddings.
        image_trainable: whether the image tower trains.
        device: where the models live.
        lora: how the image encoder is adapted; None trains its own weights.
        bf16: whether the models compute in bfloat16.

    Attributes:
        base: digest of the weights under the adapters, None without `lora`.

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
    ):
        if lora and not image_trainable:
            raise InputError("adapters train the image encoder; give either --lora_rank or --image_trainable False")
        self.build_encoder = build_encoder
        self.starts_pretrained = starts_pretrained or lora is not None
        self.text_dim = text_dim
        self.image_trainable = image_trainable
        self.device = torch.device(device)
        self.lora, self.bf16 = lora, bf16
        with torch.random.fork_rng():
            torch.manual_seed(BASE_SEED)
            self.encoder = self._build()
        self.base = base_digest(self.encoder) if lora else None
        self.start = {name: value.clone() for name, value in self.encoder.state_dict().items()}

    @property
    def trains(self) -> str:
        """What trains in the image tower, for tables."""
        if not self.image_trainable:
            return "text projection alone"
        return str(self.lora) if self.lora else "whole image encoder"

    def _build(self) -> ImageEncoder:
        encoder = self.build_encoder().requires_grad_(self.image_trainable)
        if self.lora:
            add_lora(encoder, self.lora)
        return encoder

    def fresh(self, seed: int) -> CLIPModel:
        """A model in its initial state for `seed`. It shares storage with the model given before."""
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            if self.starts_pretrained:
                self.encoder.load_state_dict(self.start)
                reset_lora(self.encoder)
            else:
                self.encoder = self._build()
            projection = ProjectionHead(self.text_dim, self.encoder.width)
        model = CLIPModel(self.encoder, projection, self.bf16).to(self.device, memory_format=torch.channels_last)
        return model.train()
