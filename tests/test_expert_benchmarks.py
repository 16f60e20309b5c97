"""The benchmarks of experts run, on tiny networks, and print one Markdown table."""

from transformers import BertConfig

from benchmarks import expert_bytes, expert_step


def table(text):
    """Cells of the table's rows by their first column, and its head."""
    head, _, *rows = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if "|" in line
    ]
    assert all(len(row) == len(head) for row in rows)
    return head, {row[0]: row[1:] for row in rows}


def test_bytes_of_an_expert(capsys, tmp_path):
    tiny = ["--image_encoder", "test_nfnet", "--image_size", "32", "--text_dim", "768", "--lr", "0.01"]
    expert_bytes.main([*tiny, "--lr_student", "0.001", "--folder", str(tmp_path)])
    head, rows = table(capsys.readouterr().out)
    assert head[3] == "share of released" and len(rows) == 5
    name = "ours, --keep_epochs 2, fp16"
    assert float(rows[name][2]) < 0.3 and float(rows[name][4]) < 1e-4
    assert float(rows["ours, --keep_epochs 2, fp32"][4]) < 1e-5  # the order of a sum depends on where tensors lie
    assert not list(tmp_path.iterdir())


def test_step_of_an_expert(capsys, monkeypatch):
    small = BertConfig(num_hidden_layers=1, vocab_size=30522)
    monkeypatch.setattr(expert_step, "BertConfig", lambda: small)
    tiny = ["--image_encoder", "test_nfnet", "--image_size", "32", "--batch", "2", "--pictures", "4", "--repeats", "1"]
    expert_step.main([*tiny, "--device", "cpu"])
    head, rows = table(capsys.readouterr().out)
    assert head[4:9] == [f"{part}, s" for part in expert_step.PARTS]
    assert list(rows) == ["cached", "decoded and embedded, 35 tokens", "decoded and embedded, 24 tokens"]
    assert rows["cached"][1] == "1.00"
