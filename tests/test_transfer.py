"""The table of transfer at toy size, its scripts called in this process."""

import json

import pytest

import buffer
import coreset
import distill
import evaluate
from benchmarks.transfer import __main__ as transfer
from tests.conftest import QUICK_BUFFER, QUICK_DISTILL
from tests.programs import table
from utils.sets import load_synset

HEADS = ["--image_trainable", "False", "--only_has_image_projection", "--no_image_pretrained"]
TWO = ["--image_encoder", "test_nfnet", "test_resnet", "--image_checkpoint", "none", "none"]
ONE = ["--image_encoder", "test_nfnet", "--image_checkpoint", "none"]


@pytest.fixture(scope="module")
def transfer_table(tiny_argv, save_bert, tmp_path_factory):
    """Runs the benchmark over a learned set and a coreset; gives its folder and the cells that it scored."""
    folder = tmp_path_factory.mktemp("transfer")
    bert = save_bert(folder / "bert")
    for text_encoder in ("demo", bert):
        text = ["--text_encoder", text_encoder, "--buffer_path", f"{folder}/B", "--num_experts", "1"]
        assert buffer.main([*tiny_argv, *QUICK_BUFFER, *TWO, *HEADS, *text]) == 0
    quick = [*tiny_argv, *QUICK_DISTILL, *ONE, *HEADS, "--buffer_path", f"{folder}/B", "--save_dir", f"{folder}/S"]
    assert distill.main([*quick, "--Iteration", "1", "--text_only", "--no_report"]) == 0
    of_coreset = ["--method", "random", "--num_queries", "6", "--output", f"{folder}/random.safetensors"]
    assert coreset.main([*tiny_argv, *ONE, *HEADS, *of_coreset]) == 0
    sets = [f"learned={folder}/S/last.safetensors", f"random={folder}/random.safetensors"]

    def start(number):
        scored = []

        def run(script, argv, cell, needed):
            scored.append(cell.name)
            assert script == "evaluate.py" and evaluate.main([str(value) for value in argv]) == 0

        own = ["--output", f"{folder}/F", "--synset", *sets[:number], *TWO, "--text_encoder", "demo", bert]
        rates = ["--grid_img", "0.01", "--grid_txt", "0.01", "--num_eval", "2", "--all_data", f"{folder}/B"]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(transfer, "run", run)
            quick = ["--no_image_pretrained", "--epoch_eval_train", "2", "--text_pooling", "mean"]
            transfer.main([*own, *rates, "--", *quick])
        return folder / "F", scored

    return start


def test_cells_are_kept_and_scored_anew_with_another_set(transfer_table):
    for number, scored in ((1, 4), (1, 0), (2, 4), (2, 0)):
        folder, names = transfer_table(number)
        assert len(names) == scored
    cells = json.loads((folder / "table.json").read_text())
    assert len(cells) == 2 * 2 * 3  # text encoders × image encoders × (two sets and all data)
    assert {(c["name"], c["image_encoder"]) for c in cells if c["took_part"]} == {("learned", "test_nfnet")}
    assert {c["texts"] for c in cells if c["name"] == "learned"} == {"learned", "carried"}
    assert (folder / "shares.png").stat().st_size > 1000


def test_the_table_gives_recall_and_share(transfer_table):
    folder, _ = transfer_table(2)
    cells = json.loads((folder / "table.json").read_text())
    text = (folder / "table.md").read_text()
    first, second = text.split("\n\nText encoder ")
    head, rows = table(first)
    assert head == ["set", "pairs", "pictures", "MB", "test_nfnet", "test_resnet"]
    assert [row[0] for row in rows] == ["learned", "random", "all data"]
    by_place = {(c["name"], c["image_encoder"]): c for c in cells if c["text_encoder"] == "demo"}
    for name, *_, home, other in rows[:2]:
        for text, encoder in ((home, "test_nfnet"), (other, "test_resnet")):
            cell, experts = by_place[name, encoder], by_place["all data", encoder]
            wanted = f"{cell['mean']:.1f} ± {cell['std']:.1f} ({cell['mean'] / experts['mean']:.2f})"
            assert text == (f"**{wanted}**" if (name, encoder) == ("learned", "test_nfnet") else wanted)
    pairs = len(load_synset(folder.parent / "S/last.safetensors").captions)
    assert rows[0][1:3] == [str(pairs)] * 2 and rows[1][1:3] == ["6", "6"] and rows[2][1:4] == ["all", "all", ""]
    assert len(table(second)[1]) == 3
