"""A set of synthetic (or chosen real) pairs on disk."""

from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from data.errors import InputError
from data.transforms import normalize
from utils.files import open_tensors, save_tensors
from utils.forms import Mixture, PictureForm, Sentences
from utils.sets.folders import CAPTIONED, LEFT_OUT, read_folder
from utils.sets.misfit import misfit
from utils.sets.pairs import Pairs
from utils.sets.released import METHOD, is_released, read_released
from utils.sets.similarity import PARTS, similarity_matrix, similarity_misfit, similarity_names

KIND = "set of pairs"
TENSORS = ("text_syn", "syn_lr_img", "syn_lr_txt")
PIXELS, MIXTURE = ("image_syn",), ("pix_weights", "pix_words", "pix_sizes")  # one of the two
TERMS = "txt_rows", "txt_weights"  # of texts that are made of sentences
# Methods of coreset.py: a pair's text is the embedding of its caption, or something made from several embeddings.
REAL_PAIRS = ("random", "herding", "kcenter", "kmeans", "forgetting")
MADE_TEXTS = ("prototypes",)


@dataclass
class SynSet:
    """M pairs that a fresh model can be trained on.

    Attributes:
        image_syn: [M, 3, H, W], pixels normalised with mean and std; with `mixture` those that it started from.
        text_syn: [M, D_text], embeddings of the frozen text encoder in `settings`.
        syn_lr_img, syn_lr_txt: the rates to train the image and the text tower with; of a set that was learned through
            several image encoders the geometric means of theirs, see `for_encoder`; None of pairs without rates.
        captions: the nearest real caption of each row of text_syn; of real pairs, the pair's own.
        mean, std: normalisation of image_syn, three floats each.
        settings: of the run that made it: method, dataset, encoders, seed and the rest of its command line.
        files, scores: of a coreset, the picture's name in the annotations and the method's score of each pair.
        similarity, alpha: parts of the soft targets and their α, see `utils.sets.similarity`; none for hard targets.
        loss_type: what to train with, see `networks.loss.PairLoss`.
        phases: parts of the set that a model trains on one after the other, see `phase_rows`.
        mixture: what to train on in the place of image_syn, over a frozen image encoder; None for image_syn itself.
        rates: of a set that was learned through several image encoders, [syn_lr_img, syn_lr_txt] by their names.
        sentences: what the rows of text_syn are made of, so that any text encoder can give them; None of free texts.
        texts: where text_syn comes from; "learned" is from the file, for others see `utils.setup.texts`. Not saved.
    """

    image_syn: torch.Tensor
    text_syn: torch.Tensor
    syn_lr_img: float | None
    syn_lr_txt: float | None
    captions: list[str]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    settings: dict = field(default_factory=dict)
    files: list[str] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    similarity: tuple[torch.Tensor, ...] = ()
    alpha: float = 1.0
    loss_type: str = "InfoNCE"
    phases: int = 1
    mixture: Mixture | None = None
    rates: dict[str, list[float]] = field(default_factory=dict)
    sentences: Sentences | None = None
    texts: str = "learned"

    def for_encoder(self, name: str) -> "SynSet":
        """The set with the rates that it learned for the image encoder `name`; as it is for any other one."""
        lr_img, lr_txt = self.rates.get(name, (self.syn_lr_img, self.syn_lr_txt))
        return replace(self, syn_lr_img=lr_img, syn_lr_txt=lr_txt)

    @property
    def nbytes(self) -> int:
        """Of pictures, texts and soft targets, as the file holds them."""
        pictures = self.mixture.nbytes if self.mixture else self.image_syn.nbytes
        return pictures + self.text_syn.nbytes + sum(part.nbytes for part in self.similarity)

    @property
    def is_captioned(self) -> bool:
        """Whether it is pictures with captions of another program, without embeddings and rates."""
        return self.settings.get("method") == CAPTIONED

    @property
    def is_from_elsewhere(self) -> bool:
        """Whether another program made it, so that it does not say how."""
        return self.is_captioned or self.settings.get("method") == METHOD

    @property
    def texts_are_captions(self) -> bool:
        """Whether each row of text_syn is the embedding of its caption, so that any text encoder can give it anew."""
        if self.sentences:
            return False
        method = self.settings.get("method")
        if method in ("initial", "distilled images"):  # the texts are those that distillation started from
            from_set = self.settings.get("init_set") or "init_set" in self.settings.get(LEFT_OUT, {})
            return self.settings.get("txt_init") != "noise" and not from_set
        return self.is_captioned or method in REAL_PAIRS

    @property
    def targets(self) -> torch.Tensor | None:
        """The soft targets S [M, M]; None for hard ones."""
        return similarity_matrix(self.similarity, self.alpha)


def as_synset(
    pairs: Pairs,
    form: PictureForm,
    captions: list[str],
    encoders: list[str],
    settings: dict,
    iteration: int,
    sentences: Sentences | None = None,
) -> SynSet:
    """A copy of pairs that a run learns, with all that is needed to train on them elsewhere.

    Args:
        form: of the pictures of `pairs`.
        captions: see `SynSet`.
        encoders: the image encoders that the pairs are learned through, in the order of the rates of `pairs`.
        settings: of the run: its command line by name.
        iteration: steps that the pairs have taken; the set of 0 is the initial one.
        sentences: what the texts of `pairs` are made of, if they are.
    """
    if not iteration:
        method = "initial"
    elif settings["image_only"]:
        method = "distilled images"
    else:
        method = "distilled texts" if settings["text_only"] else "distilled"
    pairs = Pairs.of(tensor.detach().clone() for tensor in pairs.tensors())
    mixture = None
    images = form.render(pairs.image_syn) if form.pictures is None else form.pictures[: len(pairs.image_syn)]
    if form.words is not None:
        mixture = Mixture(pairs.image_syn.half().float().cpu(), form.words)  # scored in the precision that is stored
    rates = torch.stack([pairs.syn_lr_img, pairs.syn_lr_txt]).view(2, -1)
    lr_img, lr_txt = rates.log().mean(dim=1).exp().tolist() if len(encoders) > 1 else rates.flatten().tolist()
    return SynSet(
        image_syn=images,
        text_syn=pairs.text_syn,
        syn_lr_img=lr_img,
        syn_lr_txt=lr_txt,
        captions=captions,
        mean=tuple(form.mean),
        std=tuple(form.std),
        settings={**settings, "method": method, "iteration": iteration},
        similarity=pairs.similarity,
        alpha=settings["alpha"],
        loss_type=settings["loss_type"],
        phases=settings["phases"],
        mixture=mixture,
        rates=dict(zip(encoders, rates.T.tolist(), strict=True)) if len(encoders) > 1 else {},
        sentences=sentences,
    )


def _first_pictures(mixture: Mixture, mean, std) -> torch.Tensor:
    """[M, 3, H, W], normalised."""
    return normalize(mixture.pictures()[: len(mixture.weights)], mean, std)


def save_synset(path: str | Path, synset: SynSet) -> None:
    """Writes the set to one safetensors file; see `SynSet` for its contents.

    Raises:
        InputError: the file cannot be written; the previous one remains.
    """
    pictures = {"image_syn": synset.image_syn}
    if synset.mixture:
        sizes = torch.tensor([len(word) for word in synset.mixture.words])
        values = synset.mixture.weights.half(), torch.cat(list(synset.mixture.words)), sizes
        pictures = dict(zip(MIXTURE, values, strict=True))
    terms = {}
    if synset.sentences:
        terms = dict(zip(TERMS, (synset.sentences.rows.int(), synset.sentences.weights), strict=True))
    tensors = {
        **pictures,
        **terms,
        "text_syn": synset.text_syn,
        "syn_lr_img": torch.tensor(synset.syn_lr_img),
        "syn_lr_txt": torch.tensor(synset.syn_lr_txt),
        **dict(zip(similarity_names(synset.similarity), synset.similarity, strict=True)),
    }
    keys = "captions", "mean", "std", "settings", "files", "scores", "alpha", "loss_type", "phases", "rates"
    named = {key: getattr(synset, key) for key in keys}
    named["sentences"] = synset.sentences.sentences if synset.sentences else None
    save_tensors(path, tensors, {"kind": KIND, **named})


def load_synset(path: str | Path) -> SynSet:
    """Reads a set: a file or exported folder of ours or, by the ending .pt or .pth, what `utils.sets.released` reads.

    Raises:
        InputError: the file is missing, damaged, not a set of pairs, lacks a part of one, or its parts do not fit.
    """
    is_folder = Path(path).is_dir()
    read = read_folder if is_folder else read_released if is_released(path) else _read
    tensors, metadata = read(path)
    names = next((parts for parts in PARTS.values() if parts and set(parts) <= set(tensors)), ())
    similarity = tuple(tensors[name] for name in names)
    mixture = _read_mixture(path, tensors, metadata)
    sentences = _read_sentences(tensors, metadata)
    problem = misfit(tensors, metadata) or similarity_misfit(similarity, len(metadata["captions"]))
    if sentences and not problem:
        problem = sentences.misfit(len(metadata["captions"]))
    if problem:
        advice = "export it again" if is_folder else "give another file" if is_released(path) else "make it again"
        raise InputError(f"{KIND} {path} is not whole: {problem}; {advice}")
    return SynSet(
        image_syn=tensors["image_syn"],
        text_syn=tensors["text_syn"],
        **{name: tensors[name].item() if name in tensors else None for name in ("syn_lr_img", "syn_lr_txt")},
        captions=metadata["captions"],
        mean=tuple(metadata["mean"]),
        std=tuple(metadata["std"]),
        settings=metadata["settings"],
        files=metadata.get("files", []),
        scores=metadata.get("scores", []),
        similarity=similarity,
        alpha=metadata.get("alpha", 1.0),
        loss_type=metadata.get("loss_type", "InfoNCE"),
        phases=metadata.get("phases", 1),
        mixture=mixture,
        rates=metadata.get("rates", {}),
        sentences=sentences,
    )


def _read_sentences(tensors: dict[str, torch.Tensor], metadata: dict) -> Sentences | None:
    """What the texts are made of, whose fit is not yet checked; None of free texts."""
    if metadata.get("sentences") is None and not set(TERMS) & set(tensors):
        return None
    rows, weights = (tensors.get(name) for name in TERMS)
    return Sentences(metadata.get("sentences"), None if rows is None else rows.long(), weights)


def _read_mixture(path, tensors: dict[str, torch.Tensor], metadata: dict) -> Mixture | None:
    """The mixture of a file that holds one, whose first pictures become `image_syn`."""
    if PIXELS[0] in tensors:
        return None
    if not set(MIXTURE) & set(tensors):
        raise InputError(f"{KIND} {path} lacks {PIXELS[0]}; make it again")
    try:
        weights, words, sizes = (tensors[name] for name in MIXTURE)
        mixture = Mixture(weights.float(), words.split(sizes.tolist()))
        tensors["image_syn"] = _first_pictures(mixture, metadata["mean"], metadata["std"])
        fits = weights.shape == (len(tensors["text_syn"]), len(sizes)) and torch.isfinite(weights).all()
    except (KeyError, OSError, RuntimeError, ValueError, TypeError) as error:
        raise InputError(f"{KIND} {path} is not whole: its pictures cannot be read ({error}); make it again") from error
    if not fits:
        raise InputError(f"{KIND} {path} is not whole: its weights do not fit its pictures; make it again")
    return mixture


def _read(path: str | Path) -> tuple[dict[str, torch.Tensor], dict]:
    handle, metadata = open_tensors(path, KIND, ("captions", "mean", "std", "settings"), TENSORS)
    return {name: handle.get_tensor(name) for name in handle.keys()}, metadata  # noqa: SIM118, a handle is no dict
