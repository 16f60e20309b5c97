"""The texts of sets for the text encoder of a run, whichever they were made with."""

from dataclasses import replace

import torch

from data.annotations import read_sentences
from data.caches.captions import embed_captions
from data.errors import InputError
from networks.text_encoder import TextEncoder
from utils.scoring import TextMap, choose_map
from utils.sets import SynSet, with_text_encoder
from utils.setup.data import read_records
from utils.setup.networks import find_device

TEXT_ENCODER = "text_encoder", "text_pooling", "text_pretrained"  # what a set's settings say of it


def with_texts(synsets: dict[str, SynSet], text_encoder: TextEncoder, args) -> dict[str, SynSet]:
    """The sets, by path, with texts of `text_encoder`; `SynSet.texts` says where they come from.

    "nearest", with --texts nearest: the set's captions, embedded. "learned": as in the file, of a set made with this
    text encoder or of one that does not say. Of a set made with another: "captions", embedded anew, where they are its
    texts; "mixed" from sentences, embedded anew, where its texts are made of such; else "carried", by a linear map from
    the other text encoder to this one.

    Raises:
        InputError: the other text encoder cannot be loaded, is not the set's, or cannot be mapped to this one.
    """
    maps = _Maps(text_encoder, args)
    carried = {path: _with_texts(path, synset, maps, args) for path, synset in synsets.items()}
    if args.map_captions and not maps.by_settings:
        print("warning: --map_captions is without effect: no set has texts of another text encoder to carry over")
    return carried


def _with_texts(path: str, synset: SynSet, maps: "_Maps", args) -> SynSet:
    made_with = with_text_encoder(synset.settings, args.text_encoder)
    home = {key: made_with.get(key) for key in TEXT_ENCODER}
    unknown = synset.is_from_elsewhere and not synset.is_captioned
    if args.texts == "learned" and (unknown or all(getattr(args, key) == home[key] for key in home)):
        return synset
    if args.texts == "nearest" or synset.texts_are_captions:
        texts = "nearest" if args.texts == "nearest" else "captions"
        return replace(synset, text_syn=embed_captions(synset.captions, maps.to, args.cache_dir), texts=texts)
    if synset.sentences:
        sentences = synset.sentences.sentences
        print(f"{path}: its {len(sentences):,} sentences embedded by {args.text_encoder}, and mixed; no map is needed")
        embeddings = embed_captions(sentences, maps.to, args.cache_dir)
        return replace(synset, text_syn=synset.sentences.mix(embeddings), texts="mixed")
    text_map = maps.map_from(home, path, synset.text_syn.shape[1])
    return synset if text_map is None else replace(synset, text_syn=text_map(synset.text_syn).float(), texts="carried")


class _Maps:
    """Linear maps to one text encoder, `to`, from others: each is fitted once, when a set asks for it.

    Attributes:
        by_settings: (the other encoder's width, its map or None), by what a set's settings say of it.
    """

    def __init__(self, to: TextEncoder, args):
        self.to, self.args = to, args
        self.by_settings = {}
        self.sentences = None

    def map_from(self, home: dict, path: str, width: int) -> TextMap | None:
        """The map from the text encoder with the settings `home`; None if it is this one under another name.

        Raises InputError if it cannot be loaded or fitted, or has another width than the texts of the set at `path`.
        """
        advice = "--texts nearest works without it"
        if None in home.values():
            lacking = ", ".join(key for key, value in home.items() if value is None)
            raise InputError(f"{path} lacks {lacking} among its settings, so its texts cannot be carried; {advice}")
        key = tuple(home.values())
        if key not in self.by_settings:
            try:
                encoder = TextEncoder(*key, find_device(self.args))
            except InputError as error:
                raise InputError(f"{path} was made with another text encoder: {error}; {advice}") from error
            self.by_settings[key] = encoder.width, self._fit(encoder)
        known_width, text_map = self.by_settings[key]
        if known_width != width:
            raise InputError(
                f"{path} holds text embeddings of width {width}, its text encoder {home['text_encoder']} gives "
                f"{known_width}; make the set again"
            )
        return text_map

    def _fit(self, home: TextEncoder) -> TextMap | None:
        names = f"text encoder {home.name} ({home.pooling}) -> {self.to.name} ({self.to.pooling})"
        if home.fingerprint() == self.to.fingerprint():
            print(f"{names}: the same weights, texts stay as they are")
            return None
        if self.sentences is None:
            self.sentences = _sentences(self.args)
        captions, groups, source = self.sentences
        embeds = [embed_captions(captions, encoder, self.args.cache_dir) for encoder in (home, self.to)]
        try:
            text_map, ridge, explained = choose_map(*embeds, groups, self.args.seed)
        except InputError as error:
            raise InputError(f"{source}: {error}; give other sentences with --map_captions") from error
        print(
            f"{names}: linear map fitted on {len(captions):,} sentences of {source}; ridge {ridge:.2g} explains "
            f"{explained:.3f} of the variance of a tenth of them, held out to choose it"
        )
        return text_map


def _sentences(args) -> tuple[list[str], torch.Tensor, str]:
    """(sentences that maps are fitted on, their groups as of `choose_map`, where they come from)."""
    if args.map_captions:
        sentences = read_sentences(args.map_captions)
        return sentences, torch.arange(len(sentences)), args.map_captions
    # All captions in their order, repeated ones too: as buffer.py embeds them, so that its cache is found.
    records = read_records(args, "train")
    groups = torch.repeat_interleave(torch.tensor([len(record.captions) for record in records]))
    return [caption for record in records for caption in record.captions], groups, "the training captions"
