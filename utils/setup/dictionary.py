"""The sentences that texts are made of with --txt_param mixture."""

import torch
from torch import Tensor

from data.annotations import read_sentences
from data.caches.captions import embed_captions
from data.errors import InputError
from data.pairs import PairDataset
from utils import ranks
from utils.matching import Dictionary
from utils.scoring import nearest_captions
from utils.setup.data import make_text_encoder

MOST_CAPTIONS = 6000  # of the training split; the time of a projection grows with them


def open_dictionary(args, text_syn: Tensor, real: PairDataset, real_embed: Tensor) -> Dictionary | None:
    """The sentences of --txt_words, or training captions; None where texts are free.

    Of more than `MOST_CAPTIONS` captions, those nearest to the first texts [M, D_text], of which these are made
    exactly where they are captions, and others drawn by the seed.

    Raises:
        InputError: the file holds no sentences, or there are fewer than a text may have.
    """
    if args.txt_param != "mixture":
        return None
    if args.txt_words:
        sentences, source = read_sentences(args.txt_words), args.txt_words
        with ranks.first_goes_first():
            embeddings = embed_captions(sentences, make_text_encoder(args), args.cache_dir)
    else:
        sentences, embeddings, source = _training_captions(args.seed, text_syn, real, real_embed)
    if args.txt_terms > len(sentences):
        raise InputError(f"--txt_terms {args.txt_terms} is more than the {len(sentences)} of {source}; lower it")
    print(f"texts are sums of at most {args.txt_terms} of {len(sentences):,} sentences, {source}")
    return Dictionary(sentences, embeddings.to(text_syn.device), args.txt_terms)


def _training_captions(seed: int, text_syn: Tensor, real: PairDataset, real_embed: Tensor):
    """(sentences, their embeddings, where they come from)."""
    rows = {caption: row for row, caption in enumerate(real.captions)}  # of distinct ones
    captions, source = list(rows), "the training captions"
    if len(captions) > MOST_CAPTIONS:
        order = torch.randperm(len(captions), generator=torch.Generator().manual_seed(seed)).tolist()
        drawn = [captions[number] for number in order[:MOST_CAPTIONS]]
        own = nearest_captions(text_syn, real_embed, real.captions)
        source = f"drawn from the {len(captions):,} training captions"
        captions = list(dict.fromkeys([*own, *drawn]))[:MOST_CAPTIONS]
    return captions, real_embed[[rows[caption] for caption in captions]], source
