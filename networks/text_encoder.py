"""Frozen text encoders: Hugging Face models by id or folder; captions in, embeddings out."""

import hashlib
from pathlib import Path

import torch
from tqdm import tqdm

from data.errors import InputError

SHORT_NAMES = {
    "bert": "bert-base-uncased",
    "distilbert": "distilbert-base-uncased",
    "clip": "openai/clip-vit-base-patch32",
    "demo": str(Path(__file__).parent / "demo_bert"),
}
NO_WEIGHTS = {"demo"}  # a configuration and a vocabulary alone: always drawn from the fixed seed
RANDOM_WEIGHTS_SEED = 0
MAX_TOKENS = 77  # 30 words fit; the longest CLIP takes


class TextEncoder:
    """A frozen text encoder in evaluation mode.

    CLIP gives its pooled, projected text embedding. Other models give the last hidden state of the first token
    (`pooling="cls"`), its mean over the caption's tokens (`pooling="mean"`), or that of the last token
    (`pooling="last"`, for models whose tokens see only those before them, as GPT-2's). Of an encoder-decoder (T5) the
    encoder alone is used.

    Args:
        name: short name, Hugging Face id, or a folder with config, tokenizer and weights.
        pooling: "cls", "mean" or "last"; without effect on CLIP.
        pretrained: False draws the weights from a fixed seed.

    Attributes:
        width: of the embeddings, D.

    Raises:
        InputError: the model or its tokenizer cannot be loaded.
    """

    def __init__(self, name: str, pooling: str = "cls", pretrained: bool = True, device="cpu"):
        import transformers  # slow to import: see networks/image_encoder.py

        self.name = name
        self.pooling = pooling
        self.device = torch.device(device)
        source = SHORT_NAMES.get(name, name)
        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        try:
            config = transformers.AutoConfig.from_pretrained(source, trust_remote_code=False)
            self.is_clip = config.model_type in ("clip", "clip_text_model")
            self.tokenizer = transformers.AutoTokenizer.from_pretrained(
                source, padding_side="right", trust_remote_code=False
            )
            if self.tokenizer.pad_token is None:
                if self.tokenizer.eos_token is None:
                    raise ValueError("its tokenizer has neither a pad token nor one that ends a text")
                self.tokenizer.pad_token = self.tokenizer.eos_token  # never looked at: the mask leaves it out
            self.tokenizer(["a"])  # an empty vocabulary shows only when it is used
            auto = transformers.CLIPTextModelWithProjection if self.is_clip else transformers.AutoModel
            model = self._load(auto, source, config, pretrained and name not in NO_WEIGHTS)
        except Exception as error:  # damaged files fail in many ways
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise InputError(
                f"cannot load text encoder '{name}' ({reason}); give one of {', '.join(SHORT_NAMES)}, "
                "a Hugging Face id that can be downloaded, or a local folder"
            ) from error
        if getattr(config, "is_encoder_decoder", False):
            model = model.get_encoder()
        # A file in half precision is no reason to compute in it: slower on a CPU, and another embedding.
        self.model = model.float().eval().requires_grad_(False).to(self.device)
        self.width = model.config.projection_dim if self.is_clip else model.config.hidden_size

    def _load(self, auto, source, config, pretrained):
        if pretrained:
            model, found = auto.from_pretrained(source, output_loading_info=True)
            # What a file lacks would be drawn at random, without a word; a pooler is not used here.
            lacking = sorted(key for key in found["missing_keys"] if "pooler" not in key)
            if lacking:
                raise ValueError(
                    f"its weights lack {lacking[0]}" + (f" and {len(lacking) - 1} more" if lacking[1:] else "")
                )
            return model
        if self.is_clip:
            config = getattr(config, "text_config", config)
        with torch.random.fork_rng():
            torch.manual_seed(RANDOM_WEIGHTS_SEED)
            return auto(config) if self.is_clip else auto.from_config(config)

    def fingerprint(self) -> str:
        """Hex digest of the pooling, the vocabulary and every weight: the same digest, the same embeddings."""
        digest = hashlib.sha256(f"{self.pooling} {self.is_clip}".encode())
        digest.update(repr(sorted(self.tokenizer.get_vocab().items())).encode())
        for key, value in sorted(self.model.state_dict().items()):
            digest.update(key.encode())
            digest.update(value.detach().cpu().contiguous().view(torch.uint8).numpy())
        return digest.hexdigest()

    @torch.no_grad()
    def encode(self, captions: list[str], batch_size: int = 256) -> torch.Tensor:
        """Embeds captions: list of N strings -> float32 [N, D] on the CPU.

        Long ones go first and together: a batch is padded to its longest.
        """
        embeddings = torch.empty(len(captions), self.width)
        order = sorted(range(len(captions)), key=lambda row: -len(captions[row]))
        batches = [order[first : first + batch_size] for first in range(0, len(order), batch_size)]
        few = True if len(batches) < 10 else None  # None: a bar on a terminal alone
        for rows in tqdm(batches, desc="embedding captions", unit="batch", disable=few, leave=False):
            tokens = self.tokenizer(
                [captions[row] for row in rows],
                padding=True,
                truncation=True,
                max_length=MAX_TOKENS,
                return_tensors="pt",
            ).to(self.device)
            embeddings[rows] = self._pool(tokens).cpu()
        return embeddings

    def _pool(self, tokens):
        output = self.model(**tokens)
        if self.is_clip:
            return output.text_embeds
        if self.pooling == "cls":
            return output.last_hidden_state[:, 0]
        if self.pooling == "last":
            last = tokens["attention_mask"].sum(1) - 1  # padding is on the right
            return output.last_hidden_state[torch.arange(len(last), device=last.device), last]
        mask = tokens["attention_mask"].unsqueeze(-1)  # [B, L, 1]
        return (output.last_hidden_state * mask).sum(1) / mask.sum(1)
