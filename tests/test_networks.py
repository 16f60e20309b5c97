"""Encoders, projection head, fresh models and the contrastive loss; no download, weights made here."""

import json
import math
import shutil
import urllib.error
from pathlib import Path

import pytest
import timm
import tokenizers
import torch
import transformers
from safetensors.torch import save_file
from torchvision import models

from networks import text_encoder
from networks.clip_model import CLIPModel, ModelFactory, ProjectionHead, trained_parameters
from networks.derivatives.activations import Hardsigmoid, SiLU
from networks.image_encoder import SHORT_NAMES, ImageEncoder, build_image_encoder
from networks.loss import PairLoss
from networks.text_encoder import TextEncoder
from tests.programs import input_error

# ---- image encoders


@pytest.mark.parametrize("name", SHORT_NAMES)
def test_short_names_stand_for_timm_models(name):
    assert timm.is_model(SHORT_NAMES[name].split(".")[0])


@pytest.mark.parametrize(("name", "width"), [("nf_regnet", 960), ("vit", 192), ("test_nfnet", 192), ("test_vit", 64)])
def test_encoder_by_name_gives_pooled_features(name, width):
    encoder = build_image_encoder(name, 32, pretrained=False)
    assert encoder.width == width
    assert encoder(torch.zeros(2, 3, 32, 32)).shape == (2, width)
    config = timm.get_pretrained_cfg(SHORT_NAMES.get(name, name))
    assert (encoder.mean, encoder.std) == (config.mean, config.std)


def test_kwargs_reach_timm():
    assert build_image_encoder("test_vit", 32, pretrained=False, kwargs={"embed_dim": 32}).width == 32
    assert "embed_dimm" in input_error(build_image_encoder, "test_vit", 32, False, kwargs={"embed_dimm": 32})


def test_unknown_encoder_offers_near_names():
    line = input_error(build_image_encoder, "nf_resnet5", 32)
    assert "nf_resnet5" in line and "did you mean" in line and "nf_resnet50" in line
    assert "timm.list_models" in input_error(build_image_encoder, "?!", 32)


def test_size_that_the_model_refuses():
    line = input_error(build_image_encoder, "test_vit", 30, pretrained=False)
    assert "30" in line and "--image_size" in line


@pytest.mark.parametrize("name", ["test_resnet", "torchvision:resnet18"])
def test_batch_norm_statistics_never_move(name):
    encoder = build_image_encoder(name, 32, pretrained=False).train()
    assert encoder.training
    before = {name: value.clone() for name, value in encoder.named_buffers()}
    images = 5 + torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    output = encoder(images)
    assert before and all(torch.equal(value, before[name]) for name, value in encoder.named_buffers())
    assert torch.equal(encoder.eval()(images), output)


def test_attention_is_unfused_and_differentiable_twice():
    encoder = build_image_encoder("test_vit", 32, pretrained=False)
    fused = [module.fused_attn for module in encoder.modules() if hasattr(module, "fused_attn")]
    assert fused and not any(fused)
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)).requires_grad_()
    (gradient,) = torch.autograd.grad(encoder(images).square().sum(), images, create_graph=True)
    (second,) = torch.autograd.grad(gradient.square().sum(), images)
    assert torch.isfinite(second).all() and second.norm() > 0


@pytest.mark.parametrize("ending", ["safetensors", "pth"])
def test_checkpoint_is_loaded(tmp_path, ending):
    torch.manual_seed(5)
    state = timm.create_model("test_vit", num_classes=0, img_size=32).state_dict()
    path = tmp_path / f"weights.{ending}"
    save_file(state, path) if ending == "safetensors" else torch.save(state, path)
    loaded = build_image_encoder("test_vit", 32, checkpoint=str(path)).model.state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in state.items())


@pytest.mark.parametrize("name", ["timm/test_vit", "hf_hub:timm/test_vit", "hf-hub:timm/test_vit"])
def test_names_as_the_hub_writes_them(name):
    assert type(build_image_encoder(name, 32, False).model) is type(build_image_encoder("test_vit", 32, False).model)


@pytest.mark.parametrize("prefix", ["module.", "model.", "backbone.", "visual.", "module.visual."])
@pytest.mark.parametrize("wrapped", [False, True])
def test_checkpoints_of_other_programs_fit(prefix, wrapped, tmp_path, capsys):
    """With prefixes, within a larger file, with a classifier; of CLIP, whose text tower is no part of it."""
    torch.manual_seed(5)
    state = timm.create_model("test_vit", num_classes=3, img_size=32).state_dict()
    stored = {prefix + name: value for name, value in state.items()}
    if "visual." in prefix:
        stored["text.weight"] = torch.zeros(2)
    path = tmp_path / "weights.pth"
    torch.save({"state_dict": stored, "epoch": 3} if wrapped else stored, path)
    loaded = build_image_encoder("test_vit", 32, checkpoint=str(path)).model.state_dict()
    assert loaded and all(torch.equal(value, state[name]) for name, value in loaded.items())
    (line,) = capsys.readouterr().out.splitlines()
    assert line == f"{path}: left out its classifier, head.weight, head.bias"


def test_a_part_that_is_no_classifier_is_not_left_out(tmp_path):
    state = timm.create_model("test_vit", num_classes=0, img_size=32).state_dict()
    path = tmp_path / "weights.safetensors"
    save_file({**state, "neck.weight": torch.zeros(2)}, path)
    assert "neck.weight" in input_error(build_image_encoder, "test_vit", 32, checkpoint=str(path))


@pytest.mark.parametrize("name", ["test_nfnet", "test_efficientnet"])
def test_pictures_of_less_than_one_cell_are_refused(name):
    assert "--image_size 1 is less than one cell" in input_error(build_image_encoder, name, 1, False)
    build_image_encoder(name, 32, False)


@pytest.mark.parametrize("ending", ["safetensors", "pth"])
def test_wrong_checkpoints(tmp_path, ending):
    path = tmp_path / f"weights.{ending}"
    assert str(path) in input_error(build_image_encoder, "test_vit", 32, checkpoint=str(path))
    path.write_bytes(b"not weights at all")
    assert str(path) in input_error(build_image_encoder, "test_vit", 32, checkpoint=str(path))
    state = timm.create_model("test_nfnet", num_classes=0).state_dict()
    save_file(state, path) if ending == "safetensors" else torch.save(state, path)
    line = input_error(build_image_encoder, "test_vit", 32, checkpoint=str(path))
    assert str(path) in line and "test_vit" in line


def test_checkpoint_spares_the_download(monkeypatch, tmp_path):
    asked = []
    create = timm.create_model

    def create_model(name, pretrained, **kwargs):
        asked.append(pretrained)
        return create(name, pretrained=False, **kwargs)

    monkeypatch.setattr(timm, "create_model", create_model)
    path = tmp_path / "weights.safetensors"
    save_file(create("test_nfnet", num_classes=0).state_dict(), path)
    build_image_encoder("test_nfnet", 32, checkpoint=str(path))
    build_image_encoder("test_nfnet", 32)
    assert asked == [False, True]


# ---- image encoders of torchvision


def resnet_features(model, images):
    model.fc = torch.nn.Identity()
    return model(images)


def squeezenet_features(model, images):
    return model.features(images).mean((2, 3))


def mobilenet_features(model, images):
    return model.classifier[:2](model.avgpool(model.features(images)).flatten(1))


def googlenet_features(model, images):
    """The published weights were trained with the pictures normalised otherwise, by the model itself."""
    model.transform_input = True
    return resnet_features(model, images)


OF_TORCHVISION = {
    "resnet18": (resnet_features, "fc.weight, fc.bias"),
    "squeezenet1_1": (squeezenet_features, "classifier.1.weight, classifier.1.bias"),
    "mobilenet_v3_small": (mobilenet_features, "classifier.3.weight, classifier.3.bias"),
    "googlenet": (googlenet_features, "aux1.conv.conv.weight"),
}


@pytest.mark.parametrize("name", OF_TORCHVISION)
@pytest.mark.filterwarnings("ignore::FutureWarning")  # googlenet draws its weights in another way some day
def test_features_of_torchvisions_model_from_its_own_checkpoint(name, tmp_path, capsys):
    """Which has a classifier in it."""
    features, dropped = OF_TORCHVISION[name]
    model = models.get_model(name, **({"init_weights": False} if name == "googlenet" else {})).eval()
    images = torch.randn(2, 3, 64, 64)
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    encoder = build_image_encoder(f"torchvision:{name}", 64, checkpoint=str(tmp_path / "weights.pth"))
    (line,) = capsys.readouterr().out.splitlines()
    assert "left out its classifier" in line and dropped in line
    with torch.no_grad():
        found, expected = encoder.eval()(images), features(model, images)
    assert found.shape == (2, encoder.width)
    torch.testing.assert_close(found, expected)
    assert encoder.train()(images).shape == (2, encoder.width)


def test_checkpoint_of_torchvisions_model_without_classifier(tmp_path, capsys):
    state = build_image_encoder("torchvision:squeezenet1_1", 32, pretrained=False).model.state_dict()
    assert {name.partition(".")[0] for name in state} == {"features"}
    path = tmp_path / "weights.safetensors"
    save_file(state, path)
    encoder = build_image_encoder("torchvision:squeezenet1_1", 32, checkpoint=str(path))
    loaded = encoder.model.state_dict()
    assert loaded.keys() == state.keys() and all(torch.equal(loaded[name], value) for name, value in state.items())
    assert capsys.readouterr().out == ""
    save_file({**state, "neck.weight": torch.zeros(2)}, path)
    assert "neck.weight" in input_error(build_image_encoder, "torchvision:squeezenet1_1", 32, checkpoint=str(path))


OF_FAMILIES = {
    **{"alexnet": 4096, "convnext_tiny": 768, "densenet121": 1024, "efficientnet_v2_l": 1280, "inception_v3": 2048},
    **{"maxvit_t": 512, "mnasnet0_5": 1280, "mobilenet_v2": 1280, "shufflenet_v2_x0_5": 1024, "swin_t": 768},
    **{"swin_v2_t": 768, "vgg11_bn": 4096, "vit_b_32": 768},
}


@pytest.mark.parametrize("name", OF_FAMILIES)
@pytest.mark.filterwarnings("ignore::FutureWarning")  # inception_v3 draws its weights in another way some day
def test_every_family_of_torchvision_gives_its_classifiers_input(name):
    with torch.device("meta"):  # no values, only shapes
        encoder = build_image_encoder(f"torchvision:{name}", 224, pretrained=False)
        assert encoder(torch.zeros(2, 3, 224, 224)).shape == (2, encoder.width) == (2, OF_FAMILIES[name])
    rule = models.get_model_weights(name).DEFAULT.transforms()
    assert (list(encoder.mean), list(encoder.std)) == (rule.mean, rule.std)


def test_models_of_one_size_are_built_for_it():
    with torch.device("meta"):
        encoder = build_image_encoder("torchvision:vit_b_32", 64, pretrained=False)
    assert encoder.model.image_size == 64
    assert "patch size" in input_error(build_image_encoder, "torchvision:vit_b_32", 63, False)


def test_kwargs_reach_torchvision():
    encoder = build_image_encoder("torchvision:resnet18", 32, pretrained=False, kwargs={"zero_init_residual": True})
    assert encoder.model.layer1[0].bn2.weight.abs().sum() == 0
    line = input_error(build_image_encoder, "torchvision:resnet18", 32, True, kwargs={"zero_init_rest": True})
    assert "zero_init_rest" in line and "--image_kwargs" in line


def test_unknown_model_of_torchvision_offers_near_names():
    line = input_error(build_image_encoder, "torchvision:squeezenet_1_1", 32)
    assert "unknown image encoder 'torchvision:squeezenet_1_1'; did you mean torchvision:squeezenet1_1" in line
    assert "torchvision.models.list_models" in input_error(build_image_encoder, "torchvision:?!", 32)
    assert "unknown" in input_error(build_image_encoder, "torchvision:fcn_resnet50", 32)  # it segments pictures


@pytest.mark.parametrize("name", ["resnet18", "squeezenet1_1"])
def test_pictures_too_small_for_torchvisions_model(name):
    line = input_error(build_image_encoder, f"torchvision:{name}", 16, False)
    assert "--image_size 16 does not suit" in line and f"torchvision:{name}" in line and "larger" in line
    build_image_encoder(f"torchvision:{name}", 17, False)


def test_weights_of_torchvision_that_cannot_be_had(monkeypatch, tmp_path):
    def fail(*args, **kwargs):
        raise urllib.error.URLError("no network")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", fail)
    line = input_error(build_image_encoder, "torchvision:resnet18", 32)
    assert "no network" in line and "--image_checkpoint" in line


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (torch.nn.Sequential(torch.nn.Flatten(), torch.nn.ReLU()), "no linear layer"),
        (torch.nn.Sequential(torch.nn.Conv2d(3, 4, 1), torch.nn.ReLU()), "3 pooled features"),
    ],
)
def test_a_model_that_does_not_end_in_a_classifier(model, words, monkeypatch):
    monkeypatch.setattr(models, "get_model", lambda *args, **kwargs: model)
    line = input_error(build_image_encoder, "torchvision:resnet18", 32, False)
    assert "torchvision:resnet18" in line and words in line


def test_torchs_own_attention_is_differentiable_twice():
    """As torchvision's vision transformers have it, in one kernel that is not."""
    model = models.VisionTransformer(32, 16, num_layers=1, num_heads=2, hidden_dim=8, mlp_dim=8)
    model.heads, model.num_features = torch.nn.Identity(), 8
    encoder = ImageEncoder(model).double()
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    assert torch.autograd.gradgradcheck(encoder, images.requires_grad_(), fast_mode=True)


# ---- projection head and model


def test_projection_head_of_the_paper():
    head = ProjectionHead(768, 2304)
    assert sum(p.numel() for p in head.parameters()) == 7_087_104
    assert head.dropout.p == 0.1


def test_projection_head_by_hand():
    head = ProjectionHead(3, 4).double().eval()
    text_embed = torch.randn(2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    projected = text_embed @ head.projection.weight.T + head.projection.bias
    gelu = projected * (1 + torch.erf(projected / math.sqrt(2))) / 2
    total = gelu @ head.fc.weight.T + head.fc.bias + projected
    centred = total - total.mean(1, keepdim=True)
    expected = centred / (centred.square().mean(1, keepdim=True) + 1e-5).sqrt()
    assert torch.allclose(head(text_embed), expected, rtol=1e-10)


def test_model_normalises_features_and_names_its_towers():
    model = CLIPModel(build_image_encoder("test_vit", 32, pretrained=False), ProjectionHead(5, 64))
    image_features, text_features = model(torch.randn(3, 3, 32, 32), torch.randn(3, 5))
    assert torch.allclose(image_features.norm(dim=1), torch.ones(3))
    assert torch.allclose(text_features.norm(dim=1), torch.ones(3))
    assert {name.split(".")[0] for name in trained_parameters(model)} == {"image_encoder", "text_projection"}
    model.image_encoder.requires_grad_(False)
    assert {name.split(".")[0] for name in trained_parameters(model)} == {"text_projection"}


# ---- fresh models


def copy_of(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def equal_parts(left, right, tower):
    return all(torch.equal(left[name], right[name]) for name in left if name.startswith(tower))


@pytest.mark.parametrize("starts_pretrained", [True, False])
def test_fresh_models_depend_on_the_seed_alone(starts_pretrained):
    def build():
        return build_image_encoder("test_nfnet", 32, pretrained=False)

    factory = ModelFactory(build, starts_pretrained, text_dim=6)
    model = factory.fresh(3)
    first = copy_of(model)
    with torch.no_grad():  # as training would
        for p in model.parameters():
            p += 1
    state = torch.get_rng_state()
    other = copy_of(factory.fresh(4))
    assert torch.equal(torch.get_rng_state(), state)
    again = factory.fresh(3)
    assert equal_parts(first, copy_of(again), "")
    assert not equal_parts(first, other, "text_projection")
    assert equal_parts(first, other, "image_encoder") == starts_pretrained
    assert again.training


def test_untrainable_image_encoder_stays_out_of_the_parameters():
    factory = ModelFactory(lambda: build_image_encoder("test_vit", 32, False), True, 6, image_trainable=False)
    assert all(name.startswith("text_projection.") for name in trained_parameters(factory.fresh(0)))


# ---- loss


def test_contrastive_loss_by_brute_force():
    generator = torch.Generator().manual_seed(0)
    images, texts = (
        torch.nn.functional.normalize(torch.randn(5, 7, generator=generator, dtype=torch.float64), dim=1)
        for _ in range(2)
    )
    total = 0.0
    for i in range(5):
        own = math.exp(sum(images[i] * texts[i]).item() / 0.07)
        total -= math.log(own / sum(math.exp(sum(images[i] * texts[j]).item() / 0.07) for j in range(5)))
        total -= math.log(own / sum(math.exp(sum(images[j] * texts[i]).item() / 0.07) for j in range(5)))
    assert PairLoss()(images, texts).item() == pytest.approx(total / 10, rel=1e-12)


# ---- text encoders

DEMO = Path(text_encoder.SHORT_NAMES["demo"])
CAPTIONS = ["a red circle", "a small blue square to the left of a large yellow star", "a heart"]


@pytest.fixture(scope="module")
def bert_folder(save_bert, tmp_path_factory):
    return save_bert(tmp_path_factory.mktemp("text") / "bert")


def token_states(folder, caption):
    """Last hidden states of one caption alone, which needs no padding: [L, D]."""
    model = transformers.BertModel.from_pretrained(folder).eval()
    tokens = transformers.AutoTokenizer.from_pretrained(folder)(caption, return_tensors="pt")
    with torch.no_grad():
        return model(**tokens).last_hidden_state[0]


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_pooling_by_hand_and_whatever_the_batch(bert_folder, pooling):
    encoder = TextEncoder(bert_folder, pooling)
    together = encoder.encode(CAPTIONS)
    assert together.shape == (3, 16) and together.dtype == torch.float32
    for caption, row in zip(CAPTIONS, together, strict=True):
        states = token_states(bert_folder, caption)
        expected = states[0] if pooling == "cls" else states.mean(0)
        assert torch.allclose(row, expected, atol=1e-5)
        assert torch.allclose(encoder.encode([caption])[0], row, atol=1e-5)
    assert torch.allclose(encoder.encode(CAPTIONS, batch_size=2), together, atol=1e-5)
    assert not torch.allclose(together[0], together[2], atol=1e-2)


@pytest.fixture(scope="module")
def words_tokenizer():
    """Words to numbers, without a pad token, which GPT-2's has not either."""
    words = {"</s>": 0, "<unk>": 1, "a": 2, "red": 3, "circle": 4, "heart": 5, "small": 6, "square": 7}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="</s>")


@pytest.mark.parametrize("padding_side", ["left", "right"])
@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_a_model_without_a_pad_token(words_tokenizer, tmp_path, pooling, padding_side):
    """A caption's embedding is the same alone and padded beside longer ones, whatever side its tokenizer pads."""
    size = {"vocab_size": 8, "n_embd": 16, "n_layer": 2, "n_head": 2, "bos_token_id": 0, "eos_token_id": 0}
    torch.manual_seed(0)
    model = transformers.GPT2Model(transformers.GPT2Config(**size)).eval()
    model.save_pretrained(tmp_path)
    words_tokenizer.padding_side = padding_side
    words_tokenizer.save_pretrained(tmp_path)
    captions = ["a heart", "a small red circle", "square"]
    values = TextEncoder(str(tmp_path), pooling).encode(captions)
    for caption, value in zip(captions, values, strict=True):
        with torch.no_grad():
            states = model(**words_tokenizer(caption, return_tensors="pt")).last_hidden_state[0]
        expected = states[-1] if pooling == "last" else states.mean(0)
        torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-5)


def test_a_tokenizer_that_cannot_pad_is_one_line(words_tokenizer, tmp_path):
    transformers.GPT2Config(vocab_size=8, n_embd=16, n_layer=1, n_head=2).save_pretrained(tmp_path)
    bare = transformers.PreTrainedTokenizerFast(tokenizer_object=words_tokenizer.backend_tokenizer)
    bare.save_pretrained(tmp_path)
    line = input_error(TextEncoder, str(tmp_path), "mean", pretrained=False)
    assert str(tmp_path) in line and "neither a pad token nor" in line


def test_of_an_encoder_decoder_the_encoder(words_tokenizer, tmp_path):
    size = {"vocab_size": 8, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2}
    torch.manual_seed(0)
    model = transformers.T5Model(transformers.T5Config(**size, decoder_start_token_id=0)).eval()
    model.save_pretrained(tmp_path)
    words_tokenizer.save_pretrained(tmp_path)
    encoder = TextEncoder(str(tmp_path), "mean")
    with torch.no_grad():
        states = model.encoder(**words_tokenizer("a red circle", return_tensors="pt")).last_hidden_state[0]
    assert encoder.width == 16
    torch.testing.assert_close(encoder.encode(["a red circle"])[0], states.mean(0), rtol=1e-5, atol=1e-5)


def test_text_encoder_is_frozen_and_without_dropout(bert_folder):
    encoder = TextEncoder(bert_folder)
    assert not encoder.model.training
    assert not any(p.requires_grad for p in encoder.model.parameters())
    assert torch.equal(encoder.encode(CAPTIONS), encoder.encode(CAPTIONS))


def test_fingerprint_tells_encoders_apart(bert_folder, save_bert, tmp_path):
    encoder = TextEncoder(bert_folder)
    fingerprint = encoder.fingerprint()
    assert TextEncoder(bert_folder).fingerprint() == fingerprint
    assert TextEncoder(bert_folder, "mean").fingerprint() != fingerprint
    assert TextEncoder(save_bert(tmp_path / "other", seed=6)).fingerprint() != fingerprint
    with torch.no_grad():
        next(iter(encoder.model.parameters())).view(-1)[3] += 1e-3
    assert encoder.fingerprint() != fingerprint


def test_a_file_in_half_precision_is_computed_in_single(bert_folder, tmp_path):
    """And keyed by its own rounded weights, which no embeddings made in half precision have."""
    whole = TextEncoder(bert_folder, "mean")
    model = transformers.AutoModel.from_pretrained(bert_folder).half()
    model.save_pretrained(tmp_path / "half")
    whole.tokenizer.save_pretrained(tmp_path / "half")
    half = TextEncoder(str(tmp_path / "half"), "mean")
    assert {p.dtype for p in half.model.parameters()} == {torch.float32}
    rounded = {
        name: value.half().float() for name, value in whole.model.state_dict().items() if value.is_floating_point()
    }
    whole.model.load_state_dict(rounded, strict=False)
    captions = ["a dog", "two dogs run"]
    torch.testing.assert_close(half.encode(captions), whole.encode(captions), rtol=1e-6, atol=1e-6)
    assert half.fingerprint() != TextEncoder(bert_folder, "mean").fingerprint()


def test_captions_of_all_lengths_keep_their_order(bert_folder, monkeypatch):
    """Embedded together by length, so that short ones are padded little, each is what it is alone."""
    encoder, lengths = TextEncoder(bert_folder, "mean"), []
    captions = [" ".join(["a dog runs"] * n) for n in (3, 1, 7, 2, 5, 1)]
    pool = encoder._pool
    monkeypatch.setattr(encoder, "_pool", lambda tokens: lengths.append(tokens["input_ids"].shape) or pool(tokens))
    value = encoder.encode(captions, batch_size=2)
    assert [rows for rows, _ in lengths] == [2, 2, 2] and sorted(lengths, reverse=True) == lengths
    expected = torch.cat([encoder.encode([caption]) for caption in captions])
    torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-5)


def test_untrained_text_encoder_comes_from_a_fixed_seed(bert_folder):
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = TextEncoder(bert_folder, pretrained=False)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    assert TextEncoder(bert_folder, pretrained=False).fingerprint() == first.fingerprint()
    assert TextEncoder(bert_folder).fingerprint() != first.fingerprint()


def test_demo_encoder_is_always_the_same():
    torch.manual_seed(1)
    first = TextEncoder("demo", "mean")
    torch.manual_seed(2)
    assert TextEncoder("demo", "mean").fingerprint() == first.fingerprint()
    embeddings = first.encode(CAPTIONS)
    assert embeddings.shape == (3, 128)
    assert not torch.allclose(embeddings[0], embeddings[2], atol=1e-2)


def test_demo_vocabulary_leaves_no_word_unknown():
    tokenizer = TextEncoder("demo").tokenizer
    assert tokenizer.unk_token_id not in tokenizer(" ".join(CAPTIONS))["input_ids"]


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    """A CLIP text model of 16 features, projected to 12, with a vocabulary of letters."""
    folder = tmp_path_factory.mktemp("text") / "clip"
    letters = "abcdefghijklmnopqrstuvwxyz"
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    size = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    ends = {"bos_token_id": len(tokens) - 2, "eos_token_id": len(tokens) - 1, "pad_token_id": len(tokens) - 1}
    config = transformers.CLIPTextConfig(
        vocab_size=len(tokens), projection_dim=12, initializer_factor=5.0, **size, **ends
    )
    torch.manual_seed(0)
    transformers.CLIPTextModelWithProjection(config).save_pretrained(folder)
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "CLIPTokenizer", "model_max_length": 77, "pad_token": "<|endoftext|>"})
    )
    return str(folder)


def test_clip_gives_the_projected_embedding(clip_folder):
    encoder = TextEncoder(clip_folder)
    embeddings = encoder.encode(["a dog", "a longer text about two cats"])
    assert embeddings.shape == (2, encoder.width) == (2, 12)
    tokens = encoder.tokenizer("a dog", return_tensors="pt")
    model = transformers.CLIPTextModelWithProjection.from_pretrained(clip_folder).eval()
    with torch.no_grad():
        states = model.text_model(**tokens).last_hidden_state[0]
        expected = model.text_projection(states[-1])  # the last token is the end of the text
    assert torch.allclose(embeddings[0], expected, atol=1e-5)
    assert not torch.allclose(embeddings[0], embeddings[1], atol=1e-2)
    assert torch.equal(TextEncoder(clip_folder, "mean").encode(["a dog"]), encoder.encode(["a dog"]))


def test_long_captions_are_cut(bert_folder, clip_folder):
    text = " ".join(["red"] * 200)
    assert torch.isfinite(TextEncoder(bert_folder).encode([text])).all()
    assert torch.isfinite(TextEncoder(clip_folder).encode([text])).all()


def test_text_encoder_that_is_not_there(tmp_path, bert_folder):
    line = input_error(TextEncoder, str(tmp_path / "nothing"))
    assert "nothing" in line and "bert" in line
    broken = tmp_path / "broken"
    shutil.copytree(bert_folder, broken)
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    assert str(broken) in input_error(TextEncoder, str(broken))
    weights.unlink()
    assert str(broken) in input_error(TextEncoder, str(broken))


# ---- activations that keep little


def gradients_of_gradients(function, x):
    y = function(x)
    (grad,) = torch.autograd.grad(y.pow(2).sum(), x, create_graph=True)
    return y.detach(), grad.detach(), torch.autograd.grad(grad.pow(3).sum(), x)[0]


def test_silu_and_its_two_derivatives():
    x = (4 * torch.randn(200, generator=torch.Generator().manual_seed(0), dtype=torch.float64)).requires_grad_()
    ours = gradients_of_gradients(SiLU(), x)
    expected = gradients_of_gradients(torch.nn.functional.silu, x)
    for value, wanted in zip(ours, expected, strict=True):
        torch.testing.assert_close(value, wanted, rtol=1e-12, atol=1e-12)
    assert torch.autograd.gradcheck(SiLU(), x)
    assert torch.autograd.gradgradcheck(SiLU(), x)


def test_silu_keeps_two_tensors_for_a_gradient_of_a_gradient():
    kept = set()

    def note(tensor):
        kept.add(tensor.untyped_storage().data_ptr())
        return tensor

    x = torch.randn(50, requires_grad=True)
    vector = torch.ones(50, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        torch.autograd.grad(SiLU()(x), x, vector, create_graph=True)
    assert kept == {x.untyped_storage().data_ptr(), vector.untyped_storage().data_ptr()}


def test_activations_are_replaced_and_features_are_timms():
    model = timm.create_model("test_nfnet", num_classes=0).eval()
    images = torch.randn(2, 3, 64, 64)
    names = list(model.state_dict())
    with torch.no_grad():
        expected = model(images)
        encoder = ImageEncoder(model).eval()
        torch.testing.assert_close(encoder(images), expected)
    assert list(model.state_dict()) == names
    assert not any(isinstance(module, torch.nn.SiLU) for module in encoder.modules())
    assert any(isinstance(module, SiLU) for module in encoder.modules())


def test_hard_sigmoid_and_its_two_derivatives():
    x = (4 * torch.randn(200, generator=torch.Generator().manual_seed(0))).requires_grad_()
    value, torchs = Hardsigmoid()(x), torch.nn.functional.hardsigmoid(x)
    (grad,) = torch.autograd.grad(value.pow(2).sum(), x, create_graph=True)
    assert torch.equal(value, torchs) and torch.equal(grad, torch.autograd.grad(torchs.pow(2).sum(), x)[0])
    assert torch.autograd.gradgradcheck(Hardsigmoid(), x.detach().double().requires_grad_())
