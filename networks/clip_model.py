"""The student and expert network: an image encoder and a projection of frozen text embeddings."""

import torch
import torch.nn.functional as F
from torch import nn

from networks.image_encoder import ImageEncoder


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
    """

    def __init__(self, image_encoder: ImageEncoder, text_projection: ProjectionHead):
        super().__init__()
        self.image_encoder = image_encoder
        self.text_projection = text_projection

    def encode_image(self, images):  # [B, 3, H, W] -> [B, D]
        return F.normalize(self.image_encoder(images), dim=-1)

    def encode_text(self, text_embed):  # [B, D_text] -> [B, D]
        return F.normalize(self.text_projection(text_embed), dim=-1)

    def forward(self, images, text_embed):
        return self.encode_image(images), self.encode_text(text_embed)


def trained_parameters(model: CLIPModel) -> dict[str, nn.Parameter]:
    """The parameters that train, by name: what experts store, students move and matching compares."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


class ModelFactory:
    """Gives fresh models one after another without building or reading an encoder again.

    With pretrained weights every model starts at them and only the text projection is drawn anew;
    without, the image encoder is drawn anew too.

    Args:
        build_encoder: function without arguments that returns an `ImageEncoder`.
        starts_pretrained: whether `build_encoder` always returns the same weights.
        text_dim: width of the text embeddings.
        image_trainable: whether the image tower trains.
        device: where the models live.
    """

    def __init__(self, build_encoder, starts_pretrained, text_dim, image_trainable=True, device="cpu"):
        self.build_encoder = build_encoder
        self.starts_pretrained = starts_pretrained
        self.text_dim = text_dim
        self.image_trainable = image_trainable
        self.device = torch.device(device)
        self.encoder = build_encoder()
        self.start = {name: value.clone() for name, value in self.encoder.state_dict().items()}

    def fresh(self, seed: int) -> CLIPModel:
        """A model in its initial state for `seed`. It shares storage with the model given before."""
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            if self.starts_pretrained:
                self.encoder.load_state_dict(self.start)
            else:
                self.encoder = self.build_encoder()
            projection = ProjectionHead(self.text_dim, self.encoder.width)
        self.encoder.requires_grad_(self.image_trainable)
        model = CLIPModel(self.encoder, projection).to(self.device, memory_format=torch.channels_last)
        return model.train()
