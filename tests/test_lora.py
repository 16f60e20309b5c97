"""Low-rank adapters: exact merging, exact outer gradient, and the three scripts with them."""

import copy
import json
import re

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.layers.std_conv import ScaledStdConv2d
from torch import nn
from torch.nn.utils import parametrize

import buffer
import distill
import evaluate
from data.errors import InputError
from networks.clip_model import CLIPModel, ModelFactory, ProjectionHead, count_parameters, trained_parameters
from networks.image_encoder import build_image_encoder
from networks.lora import Lora, LowRankUpdate, add_lora, base_digest, find_layers
from networks.loss import PairLoss
from tests.programs import error_line
from tests.unroll import check_chunks
from utils.experts.trajectory import Trajectory, find_trajectories
from utils.sets import Pairs
from utils.student import StudentLoss

LAYERS = {
    "linear": (lambda: nn.Linear(6, 5), (3, 6)),
    "conv": (lambda: nn.Conv2d(4, 6, 3), (2, 4, 5, 5)),
    "grouped": (lambda: nn.Conv2d(4, 6, 3, groups=2), (2, 4, 5, 5)),
    "standardised": (lambda: ScaledStdConv2d(4, 6, 3, groups=2), (2, 4, 5, 5)),
}


class Encoder(nn.Module):
    """Any network in the place of a timm model."""

    def __init__(self, model, width=None):
        super().__init__()
        self.model, self.width = model, width

    def forward(self, images):
        return self.model(images)


def adapted(build, rank, **kwargs):
    encoder = Encoder(nn.Sequential(build()))
    add_lora(encoder, Lora(rank, 2.0 * rank, "all", **kwargs))
    return encoder, encoder.model[0].parametrizations.weight[0]


def build(name, size=32):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return build_image_encoder(name, size, pretrained=False)


@pytest.mark.parametrize("kind", LAYERS)
def test_merged_and_unmerged_forward_agree(kind):
    torch.manual_seed(0)
    make, shape = LAYERS[kind]
    encoder, update = adapted(make, 2)
    nn.init.normal_(update.B)
    weight, x = encoder.model[0].parametrizations.weight.original.detach().clone(), torch.randn(shape)
    before = encoder(x)
    plain = make()
    plain.load_state_dict({k: v for k, v in encoder.model[0].state_dict().items() if "param" not in k}, strict=False)
    plain.weight.data = weight + 2 * (update.B @ update.A).detach().view_as(weight)
    parametrize.remove_parametrizations(encoder.model[0], "weight", leave_parametrized=True)
    assert not parametrize.is_parametrized(encoder.model[0])
    torch.testing.assert_close(encoder(x), before, rtol=0, atol=1e-6)
    torch.testing.assert_close(plain(x), before, rtol=0, atol=1e-6)
    assert (before - make()(x)).abs().max() > 0.1


@pytest.mark.parametrize("kind", LAYERS)
def test_full_rank_represents_any_update(kind):
    torch.manual_seed(0)
    encoder, update = adapted(LAYERS[kind][0], 1000)
    layer = encoder.model[0]
    weight = layer.parametrizations.weight.original.detach().clone()
    torch.testing.assert_close(layer.weight, weight, rtol=0, atol=0)  # B = 0
    wanted = torch.randn_like(weight)
    u, s, v = torch.linalg.svd(wanted.view(len(weight), -1), full_matrices=False)
    assert update.A.shape == v.shape and update.B.shape == u.shape  # the rank is capped
    with torch.no_grad():
        update.A.copy_(v)
        update.B.copy_(u * s / update.scale)
    torch.testing.assert_close(layer.weight, weight + wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["test_vit", "test_nfnet"])
def test_first_step_moves_only_b(name):
    model = ModelFactory(lambda: build(name), True, 8, lora=Lora(2, 2.0, "all")).fresh(0)
    for n, p in model.named_parameters():
        if n.endswith("gain"):  # the last of each block is 0 without pretraining: no gradient would reach the blocks
            p.data.fill_(0.5)
    images, texts = torch.randn(4, 3, 32, 32), torch.randn(4, 8)
    before = {n: p.detach().clone() for n, p in trained_parameters(model).items()}
    StudentLoss(model)(trained_parameters(model), images, texts).backward()
    for n, p in trained_parameters(model).items():
        moved = (p.detach() - 0.1 * p.grad != before[n]).any()
        assert moved == (not n.endswith(".A")), n
    assert all(p.grad is None for n, p in model.named_parameters() if n not in before)


def test_what_trains_and_how_many():
    lora = Lora(4, 4.0)
    model = ModelFactory(lambda: build("test_vit"), True, 8, lora=lora).fresh(0)
    names = [n for n in trained_parameters(model) if n.startswith("image_encoder.")]
    assert len(names) == 2 * 2 * len(model.image_encoder.model.blocks)
    assert "image_encoder.model.blocks.0.attn.qkv.parametrizations.weight.0.A" in names
    counts = count_parameters(model)
    plain = ModelFactory(lambda: build("test_vit"), True, 8).fresh(0)
    plain_counts = count_parameters(plain)
    width, depth = model.image_encoder.width, len(model.image_encoder.model.blocks)
    assert counts["image_parameters_trained"] == depth * 4 * ((width + 3 * width) + (width + width))
    assert counts["image_parameters_full"] == plain_counts["image_parameters_trained"]
    assert counts["parameters_full"] == sum(p.numel() for p in plain.parameters())
    assert plain_counts["reduction_percent"] == 0 and 90 < counts["image_reduction_percent"] < 100
    assert ModelFactory(lambda: build("test_vit"), True, 8).trains == "whole image encoder"


@pytest.mark.parametrize(
    "name, also, wanted", [("test_vit", "norm", "norm"), ("test_nfnet", "norm", "gain"), ("test_vit", "bias", "bias")]
)
def test_what_else_trains(name, also, wanted):
    encoder = build(name)
    add_lora(encoder, Lora(1, 1.0, "all", also))
    others = [n for n, p in encoder.named_parameters() if p.requires_grad and not n.endswith((".A", ".B"))]
    expected = [n for n, p in encoder.named_parameters() if wanted in n and not n.endswith((".A", ".B"))]
    assert others == [n for n in expected if ".original" not in n] and others


def test_layers_by_name():
    vit, nfnet = build("test_vit").model, build("test_nfnet").model
    assert {n.split(".")[-1] for n in find_layers(vit, "attn")} == {"qkv", "proj"}
    assert {n.split(".")[-1] for n in find_layers(vit, "attn+mlp")} == {"qkv", "proj", "fc1", "fc2"}
    assert "patch_embed.proj" in find_layers(vit, "all") and "patch_embed.proj" not in find_layers(vit, "attn+mlp")
    assert list(find_layers(vit, r"blocks\.1\..*qkv")) == ["blocks.1.attn.qkv"]
    for layers in ("attn", "attn+mlp", "nothing"):
        with pytest.raises(InputError, match=r"matches no layer.*stages\.\*\.\*\.conv1"):
            find_layers(nfnet, layers)
    with pytest.raises(InputError, match="not a regular expression"):
        find_layers(vit, "(")
    with pytest.raises(InputError, match="rank"):
        add_lora(build("test_vit"), Lora(0, 1.0))
    with pytest.raises(InputError, match="image_trainable"):
        ModelFactory(lambda: build("test_vit"), True, 8, image_trainable=False, lora=Lora(1, 1.0))


def test_fresh_models_share_the_base_and_draw_adapters_by_seed():
    def unseeded():  # every call draws other weights
        return build_image_encoder("test_vit", 32, pretrained=False)

    factory = ModelFactory(unseeded, False, 8, lora=Lora(2, 2.0))
    states = [copy.deepcopy(factory.fresh(seed).state_dict()) for seed in (0, 1, 0)]
    for name, value in states[0].items():
        assert torch.equal(value, states[2][name])
        is_drawn = name.endswith(".A") or name.startswith("text_projection.") and value.std() > 0
        assert torch.equal(value, states[1][name]) == (not is_drawn), name
    assert factory.base == ModelFactory(unseeded, False, 8, lora=Lora(3, 1.0, "all")).base
    assert factory.base == base_digest(build("test_vit"))
    other = build("test_vit")
    other.model.norm.bias.data[0] += 1
    assert base_digest(other) != factory.base


def toy():
    layers = nn.Conv2d(4, 6, 3, stride=2), nn.SiLU(), ScaledStdConv2d(6, 6, 3, groups=3)
    head = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 6)
    return Encoder(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3, groups=2), *layers, *head), 6)


@pytest.mark.parametrize("name", ["test_vit", "test_nfnet", "toy"])
def test_outer_gradient_is_that_of_the_full_unroll(name):
    torch.manual_seed(0)
    encoder = toy() if name == "toy" else build(name)
    add_lora(encoder, Lora(2, 4.0, "all" if name != "test_vit" else "attn+mlp", "none" if name == "toy" else "norm"))
    pair_loss = PairLoss(temperature=0.5)
    model = CLIPModel(encoder, ProjectionHead(5, encoder.width, dropout=0.0), pair_loss=pair_loss).double()
    start = {n: p.detach().clone() for n, p in trained_parameters(model).items()}
    start = {n: v + 0.1 * torch.randn_like(v) for n, v in start.items()}
    target = {n: v + 0.01 * torch.randn_like(v) for n, v in start.items()}
    values = torch.randn(6, 3, 32, 32), torch.randn(6, 5), torch.tensor(0.02), torch.tensor(0.05)
    pairs = Pairs(*(value.double() for value in values))
    batches = [torch.tensor([0, 1, 2, 3]), torch.tensor([2, 3, 4, 5]), torch.tensor([5, 0, 1, 4])]
    check_chunks((StudentLoss(model), start, target, pairs, batches, 0), None)


@pytest.fixture(scope="module")
def tiny(tiny_argv, tmp_path_factory):
    """Flags of the tiny data with a checkpoint of test_vit, and a buffer of two LoRA experts."""
    folder = tmp_path_factory.mktemp("lora")
    save_file(build("test_vit").model.state_dict(), folder / "vit.safetensors")
    flags = [*tiny_argv, "--image_encoder", "test_vit", "--image_checkpoint", str(folder / "vit.safetensors")]
    flags += ["--buffer_path", str(folder / "buffers")]
    assert run(buffer, flags, *EXPERTS, "--num_experts", "2", "--lora_rank", "2", "--lora_alpha", "4") == 0
    return folder, flags


EXPERTS = ("--train_epochs", "2", "--batch_size_train", "32", "--no_aug", "--disabled_wandb")
DISTILL = ("--Iteration", "2", "--eval_it", "2", "--num_queries", "6", "--syn_steps", "2", "--mini_batch_size", "4")
DISTILL += ("--num_eval", "1", "--epoch_eval_train", "2", "--no_draw", "--no_report", "--disabled_wandb")


def run(script, flags, *more):
    return script.main([*flags, *more])


def test_scripts_end_to_end(tiny, tmp_path, capsys):
    folder, flags = tiny
    expert = folder / "buffers/tiny/test_vit_lora2/demo/expert_000.safetensors"
    trajectory = Trajectory(expert)
    assert {n for n in trajectory.names() if n.startswith("image_encoder")} == {
        f"image_encoder.model.blocks.{b}.attn.{layer}.parametrizations.weight.0.{m}"
        for b in range(6)
        for layer in ("qkv", "proj")
        for m in "AB"
    }
    assert len(trajectory.settings["lora_base"]) == 64 and trajectory.settings["image_reduction_percent"] > 90
    capsys.readouterr()
    assert run(distill, flags, *DISTILL, "--save_dir", str(tmp_path / "run")) == 0  # settings come from the buffer
    printed = capsys.readouterr().out
    assert re.search(r"training adapters of rank 2 on attn: [\d,]+ parameters of [\d,]+ \([\d.]+ % fewer\)", printed)
    assert "| 6 distilled pairs, training adapters of rank 2 on attn |" in printed
    first = json.loads((tmp_path / "run/metrics.jsonl").read_text().splitlines()[0])
    assert first["image_parameters_trained"] == trajectory.settings["image_parameters_trained"]
    assert run(distill, flags, *DISTILL, "--save_dir", str(tmp_path / "run"), "--resume", "--Iteration", "3") == 0

    own = ["--synset", str(tmp_path / "run/best.safetensors"), "--device", "cpu"]
    assert evaluate.main([*own, "--json", str(tmp_path / "adapters.json")]) == 0
    assert "| adapters of rank 2 on attn |" in capsys.readouterr().out
    assert evaluate.main([*own, "--eval_full", "--json", str(tmp_path / "full.json")]) == 0
    assert "| whole image encoder |" in capsys.readouterr().out
    assert evaluate.main([*own, "--image_encoder", "test_nfnet", "--no_image_pretrained"]) == 0
    assert "| whole image encoder |" in capsys.readouterr().out
    losses = [
        json.loads((tmp_path / f).read_text())["rows"][0]["mean"]["train_loss"] for f in ("adapters.json", "full.json")
    ]
    assert losses[0] != losses[1]


def test_evaluation_in_full_while_distilling(tiny, tmp_path, capsys):
    folder, flags = tiny
    assert run(distill, flags, *DISTILL, "--eval_full", "--save_dir", str(tmp_path / "run")) == 0
    printed = capsys.readouterr().out
    assert "training adapters of rank 2 on attn:" in printed
    assert "| 6 distilled pairs, training whole image encoder |" in printed


def test_mismatches_are_one_line(tiny, tmp_path, capsys):
    folder, flags = tiny

    def error(script, *more):
        return error_line(capsys, run, script, flags, *more)

    go = (*DISTILL, "--save_dir", str(tmp_path / "run"))
    assert "was trained with lora_rank=2, this run has lora_rank=3" in error(distill, *go, "--lora_rank", "3")
    assert "lora_alpha=4.0, this run has lora_alpha=1.0" in error(distill, *go, "--lora_alpha", "1")
    assert "lora_layers=attn, this run has lora_layers=all" in error(distill, *go, "--lora_layers", "all")
    assert "lora_train=none, this run has lora_train=norm" in error(distill, *go, "--lora_train", "norm")
    state = build("test_vit").model.state_dict()
    save_file({k: v + 1 for k, v in state.items()}, tmp_path / "other.safetensors")
    assert "over other frozen weights" in error(distill, *go, "--image_checkpoint", str(tmp_path / "other.safetensors"))
    experts = (*EXPERTS, "--num_experts", "2")
    assert "lora_layers=attn, this run has lora_layers=all" in error(
        buffer, *experts, "--lora_rank", "2", "--lora_alpha", "4", "--lora_layers", "all"
    )
    assert "matches no layer" in error(buffer, *experts, "--lora_rank", "5", "--lora_layers", "nothing")


def test_buffers_of_several_kinds(tiny, tmp_path, capsys):
    folder, flags = tiny
    flags = [*flags, "--buffer_path", str(tmp_path / "buffers")]
    short = (*EXPERTS, "--num_experts", "1", "--train_epochs", "1")
    go = (*DISTILL, "--max_start_epoch", "1", "--save_dir")
    assert run(buffer, flags, *short) == 0
    line = error_line(capsys, run, distill, flags, *go, str(tmp_path / "run"), "--lora_rank", "2")
    assert "trained whole, this run trains adapters of rank 2" in line
    assert run(buffer, flags, *short, "--lora_rank", "1") == 0
    assert run(buffer, flags, *short, "--lora_rank", "2", "--lora_layers", "all") == 0
    for rank, trains in ((None, "whole image encoder"), (2, "adapters of rank 2 on all")):
        chosen = [] if rank is None else ["--lora_rank", str(rank)]
        assert run(distill, flags, *go, str(tmp_path / f"run{rank}"), *chosen) == 0
        assert f"training {trains}:" in capsys.readouterr().out
    whole = tmp_path / "buffers/tiny/test_vit"
    whole.rename(tmp_path / "moved")
    line = error_line(capsys, run, distill, flags, *go, str(tmp_path / "run"))
    assert "several ranks (test_vit_lora1, test_vit_lora2); give --lora_rank" in line
    direct = [*flags, "--buffer_path", str(tmp_path / "buffers/tiny/test_vit_lora1/demo")]
    assert run(distill, direct, *go, str(tmp_path / "run1")) == 0
    assert "training adapters of rank 1 on attn:" in capsys.readouterr().out


def test_adapters_need_their_settings(tiny):
    folder, _ = tiny
    path = folder / "buffers/tiny/test_vit_lora2/demo"
    settings = {**Trajectory(path / "expert_000.safetensors").settings, "lora_rank": None}
    with pytest.raises(InputError, match="holds adapters of rank 2; give --lora_rank 2"):
        find_trajectories(path, settings, {})


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--lora_rank", "0"], "0 is less than 1"),
        (["--lora_alpha", "2"], "--lora_alpha is without effect without --lora_rank"),
        (["--lora_rank", "2", "--lora_train", "head"], "invalid choice"),
    ],
)
def test_flag_errors(flags, message, capsys):
    assert message in error_line(capsys, buffer.parse_args, flags)


def test_alpha_defaults_to_the_rank():
    args = buffer.parse_args(["--lora_rank", "8"])
    assert (args.lora_alpha, args.lora_layers, args.lora_train) == (8.0, "attn", "none")
    args = buffer.parse_args([])
    assert {args.lora_rank, args.lora_alpha, args.lora_layers, args.lora_train} == {None}


def test_update_of_a_merged_vit():
    model = timm.create_model("test_vit", num_classes=0).eval()
    encoder = Encoder(model)
    add_lora(encoder, Lora(4, 8.0, "all"))
    for module in encoder.modules():
        if isinstance(module, LowRankUpdate):
            nn.init.normal_(module.B, std=0.1)
    images = torch.randn(2, 3, 160, 160)
    with torch.no_grad():
        before = encoder(images)
        for layer in find_layers(model, "all").values():
            parametrize.remove_parametrizations(layer, "weight", leave_parametrized=True)
        torch.testing.assert_close(encoder(images), before, rtol=1e-6, atol=1e-6)
