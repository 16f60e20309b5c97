"""From a command line to data and models: the only place beside the scripts that reads `args`."""

from pathlib import Path

import torch

from data.annotations import Record, read_split
from data.augment import Augment, cached_side
from data.demo import make_demo
from data.errors import InputError
from data.image_cache import cache_images
from data.pairs import (
    PairDataset,
    RetrievalSet,
    drop_unreadable,
    find_images,
    load_images,
    pair_loader,
    retrieval_set,
    shared_pictures,
)
from data.text_cache import embed_captions
from data.transforms import normalize, train_transform
from networks.clip_model import CLIPModel, ModelFactory, count_parameters
from networks.image_encoder import build_image_encoder
from networks.lora import Lora
from networks.text_encoder import TextEncoder
from utils import ranks
from utils.matching import FIT
from utils.scoring import EmbedLoader, embed_images, embed_views, kmeans, pair_features, random_rows
from utils.sets import Pairs, SynSet, initial_similarity, load_synset


def find_device(args) -> torch.device:
    """The device of --device. Raises InputError if it is not there."""
    try:
        device = ranks.device(args.device)
        torch.zeros(1, device=device).item()  # the meta device has no numbers
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"--device {args.device} cannot be used ({str(error).splitlines()[0]})") from error
    return device


def find_split(args, split: str) -> tuple[list[Record], list[Path]]:
    """The records of a split and their picture files, without opening a picture (but see --skip_broken)."""
    if args.dataset == "demo":
        make_demo(Path(args.ann_root))
    records = read_split(args.dataset, split, args.ann_root, args.split_seed)
    paths = find_images(records, args.image_root)
    if args.skip_broken:
        records, paths, dropped = drop_unreadable(records, paths)
        if dropped:
            print(f"warning: left out {len(dropped)} unreadable pictures of {split}, the first is {dropped[0]}")
        if not records:
            raise InputError(f"no readable picture in {split}; check --image_root")
    return records, paths


def warn_of_shared_pictures(train: tuple, *others: tuple) -> None:
    """Says in one line if pictures of the train split are in other splits too; all as of `find_split`."""
    shared = shared_pictures(train[1], [path for _, paths in others for path in paths])
    if shared:
        examples = ", ".join(f"{path}" if path == other else f"{path} as {other}" for path, other in shared[:2])
        print(
            f"warning: the pictures of train and those that are scored have {len(shared)} in common, by file or by "
            f"bytes: {examples}"
        )


def make_text_encoder(args) -> TextEncoder:
    return TextEncoder(args.text_encoder, args.text_pooling, args.text_pretrained, find_device(args))


def training_pairs(args, split, text_encoder) -> tuple[PairDataset, torch.Tensor]:
    """Pairs, one row per caption, and the captions' embeddings [rows, D_text]; `split` from `find_split`."""
    dataset = PairDataset(*split, train_transform(args.image_size, args.no_aug))
    return dataset, embed_captions(dataset.captions, text_encoder, args.cache_dir)


def expert_loader(args, pairs: PairDataset, factory: ModelFactory):
    """(loader of an expert's batches by its seed, what augments them on the device if anything).

    Where the image encoder is frozen, the batches hold its output for the pictures, computed once.
    """
    if factory.image_trainable:
        if args.aug_views:
            raise InputError("--aug_views is for a frozen image encoder; drop it or give --image_trainable False")
        augment = use_image_cache(pairs, args) if args.cache_images else None
        return lambda seed: pair_loader(pairs, args.batch_size_train, seed, args.num_workers), augment
    if args.cache_images:
        raise InputError("--cache_images has no use where the image encoder is frozen: its output is cached; drop it")
    sizes = args.image_size, 0 if args.no_aug else args.aug_views, args.batch_size_test, args.num_workers
    image_embed = embed_views(pairs.paths, factory.encoder, *sizes, factory.device, args.cache_dir)
    return lambda seed: EmbedLoader(image_embed, pairs.row_to_image, args.batch_size_train, seed), None


def use_image_cache(dataset: PairDataset, args) -> Augment | None:
    """Lets the pairs read their pictures from the cache, made if need be; returns what augments on the device, if any.

    On a CPU the loader's workers augment. See `data.image_cache` for the errors.
    """
    with ranks.first_goes_first():
        dataset.cache = cache_images(dataset.paths, cached_side(args.image_size, args.no_aug), args.cache_dir)
    augment = None if args.no_aug else Augment(args.image_size)
    on_device = augment is not None and augments_on(find_device(args))
    dataset.transform = _as_it_is if augment is None or on_device else augment.one
    return augment if on_device else None


def augments_on(device: torch.device) -> bool:
    return device.type == "cuda"


def _as_it_is(image):
    return image


def retrieval_pairs(args, split, text_encoder) -> tuple[RetrievalSet, torch.Tensor]:
    """A retrieval set and its captions' embeddings [C, D_text]; `split` from `find_split`."""
    whole = retrieval_set(*split, args.image_size)
    return whole, embed_captions(whole.captions, text_encoder, args.cache_dir)


def make_factory(args, text_dim: int, train_in_full: bool = False) -> ModelFactory:
    """Gives fresh models with the encoders of the command line; `train_in_full` leaves adapters out."""

    def build():
        return build_image_encoder(
            args.image_encoder, args.image_size, args.image_pretrained, args.image_checkpoint, args.image_kwargs
        )

    starts_pretrained = args.image_pretrained or args.image_checkpoint is not None
    lora = None if train_in_full else lora_of(args)
    device = find_device(args)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = args.precision == "tf32"
    bf16 = args.precision == "bf16"
    projected = args.only_has_image_projection
    return ModelFactory(build, starts_pretrained, text_dim, args.image_trainable, device, lora, bf16, projected)


def lora_of(args) -> Lora | None:
    return None if args.lora_rank is None else Lora(args.lora_rank, args.lora_alpha, args.lora_layers, args.lora_train)


def expert_recipe(args) -> dict:
    """How an expert is trained: the keyword arguments of `train_epochs`."""
    return {
        **{"epochs": args.train_epochs, "lr_img": args.lr_teacher_img, "lr_txt": args.lr_teacher_txt},
        **{"momentum": args.mom, "weight_decay": args.l2, "decay": args.decay},
    }


def describe_training(factory: ModelFactory, model: CLIPModel) -> dict:
    """Prints once what trains; returns the counts and the digest of the frozen weights, to be saved as settings."""
    counts = count_parameters(model)
    line = f"training {factory.trains}: {counts['parameters_trained']:,} parameters"
    if counts["parameters_trained"] < counts["parameters_full"]:
        line += (
            f" of {counts['parameters_full']:,} ({counts['reduction_percent']:.2f} % fewer), in the image tower "
            f"{counts['image_parameters_trained']:,} of {counts['image_parameters_full']:,} "
            f"({counts['image_reduction_percent']:.2f} % fewer)"
        )
    print(line)
    return {**counts, "lora_base": factory.base}


def check_encoder_features(args, flag: str, way_out: str = "") -> None:
    """Raises InputError if `flag` would compare features of an image encoder that has learned nothing."""
    if not (args.image_pretrained or args.image_checkpoint):
        raise InputError(
            f"{flag} needs a pretrained image encoder; drop --no_image_pretrained, give --image_checkpoint{way_out}"
        )


def encoder_features(args, kind: str, real: PairDataset, real_embed, encoder, device) -> torch.Tensor:
    """Features [rows, D] of the real pairs, see `pair_features`; pictures are encoded only if they are needed."""
    image_embed = None
    if kind != "text":
        sizes = args.image_size, args.batch_size_test
        image_embed = embed_images(real.paths, encoder, *sizes, device, args.cache_dir)
    return pair_features(kind, image_embed, real_embed, real.row_to_image)


def initial_pairs(args, real: PairDataset, real_embed, encoder, device) -> Pairs:
    """Pairs of --init_set, or real pairs of distinct pictures: one random caption each, or the prototypes of k-means.

    Noise in the place of either modality has the mean and spread of the real ones.
    """
    generator = torch.Generator().manual_seed(args.seed)
    if args.init_set:
        first = fitting_set(args, encoder, real_embed.shape[1])
        image_syn, text_syn = first.image_syn.float(), first.text_syn.float()
    else:
        if args.pix_init == "kmeans":
            features = encoder_features(args, "joint", real, real_embed, encoder, device)
            rows = kmeans(features, real.row_to_image, args.num_queries, generator)[0]
        else:
            rows = random_rows(real.row_to_image, args.num_queries, generator)
        text_syn = real_embed[rows]
        if args.pix_init != "noise":
            images = load_images([real.paths[i] for i in real.row_to_image[rows]], args.image_size)
            image_syn = normalize(images, encoder.mean, encoder.std)
    if args.pix_init == "noise":
        image_syn = torch.randn(args.num_queries, 3, args.image_size, args.image_size, generator=generator)
    if args.txt_init == "noise":
        text_syn = torch.randn(text_syn.shape, generator=generator) * real_embed.std() + real_embed.mean()
    given = args.lr_teacher_img, args.lr_teacher_txt
    rates = (torch.tensor(1.0 if rate == FIT else rate) for rate in given)  # fitted when experts and student are known
    similarity = initial_similarity(args.sim_type, args.num_queries, args.sim_rank, generator)
    image_syn = image_syn.to(device, memory_format=torch.channels_last)
    return Pairs.of([image_syn, *(tensor.to(device) for tensor in (text_syn, *rates, *similarity))])


def fitting_set(args, encoder, text_dim: int) -> SynSet:
    """The set of --init_set. Raises InputError if its pairs are not such as this run learns."""
    synset = load_synset(args.init_set)
    height, width = synset.image_syn.shape[2:]
    parts = [
        ("number of pairs", len(synset.image_syn), args.num_queries),
        ("picture size", f"{height} x {width}", f"{args.image_size} x {args.image_size}"),
        ("text width", synset.text_syn.shape[1], text_dim),
        ("mean and std", (synset.mean, synset.std), (tuple(encoder.mean), tuple(encoder.std))),
    ]
    made = synset.settings
    parts += [(key, made[key], getattr(args, key)) for key in ("text_encoder", "text_pooling") if key in made]
    for name, of_set, of_run in parts:
        if of_set != of_run:
            raise InputError(
                f"--init_set {args.init_set} does not fit: its {name} is {of_set}, that of this run {of_run}; "
                "change the run or give another set"
            )
    return synset
