"""`tpcheck compare` of runs from other initial weights, and of vocabularies padded differently."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tests.support import traces
from tpcheck.cli import main
from tpcheck.trace.compare.command import compare

WIDTH, TRUE = 8, 11


class Language(nn.Module):
    """Embedding, two layers, output layer, losses; padded to a vocabulary on which nothing else depends."""

    def __init__(self, padded: int = 12, width: int = WIDTH) -> None:
        super().__init__()
        self.word_embeddings, self.output_layer = nn.Embedding(padded, width), nn.Linear(width, padded, bias=False)
        self.up, self.norm, self.down = (
            nn.Linear(width, 2 * width),
            nn.LayerNorm(2 * width),
            nn.Linear(2 * width, width),
        )
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in (self.up.weight, self.up.bias, self.down.weight, self.down.bias):
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / 4)
            for parameter in (self.word_embeddings.weight, self.output_layer.weight):
                parameter.copy_(torch.randn(64, width, generator=generator)[:padded] / 4)

    def forward(self, tokens: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        logits = self.output_layer(self.down(torch.relu(self.norm(self.up(self.word_embeddings(tokens))))))
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view(labels.shape)


def recorded(path: Path, model: nn.Module, **options: Any) -> Path:
    """A trace of two steps on the same tokens."""
    tokens = torch.randint(0, TRUE, (2, 4, 6), generator=torch.Generator().manual_seed(1))
    return traces.recorded(path, model, lambda: model(tokens[0], tokens[1]).mean(), **options)


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = recorded(tmp_path_factory.mktemp("weights") / "a", Language())
    for seed in (1, 2, 3):
        recorded(path / f"noise-{seed}", Language(), perturb=seed)
    return path


def redrawn(model: nn.Module, *names: str) -> nn.Module:
    """`model` with the parameters whose names begin so drawn anew."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.startswith(names):
                parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(7)) / 4)
    return model


def test_a_run_from_other_weights_is_called_so_and_nothing_after_them_is_suspect(
    reference: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    b = recorded(tmp_path / "b", redrawn(Language(), "up", "down", "word", "output"))
    assert main(["compare", str(reference), str(b), "--report", str(tmp_path / "page.html")]) == 1
    printed = capsys.readouterr().out
    assert (
        "not rounding: the runs start from other weights: 6 of 6 parameters that are drawn at random differ" in printed
    )
    assert "(word_embeddings.weight, output_layer.weight, up.weight, …)" in printed
    assert "the runs start from other weights" in (tmp_path / "page.html").read_text()
    found = compare(reference, b)
    assert found.verdict == "other weights" and found.first is None
    assert {row.verdict for row in found.rows if row.key.kind == "start"} == {"other weights", "identical"}
    assert {row.verdict for row in found.rows if row.key.kind == "out"} == {"unknown"}


def test_other_weights_need_no_nudged_runs_to_be_told(tmp_path: Path) -> None:
    a = recorded(tmp_path / "a", Language())
    b = recorded(tmp_path / "b", redrawn(Language(), "up", "down", "word", "output"))
    assert compare(a, b).verdict == "other weights"


def test_one_parameter_that_starts_otherwise_is_the_suspect(reference: Path, tmp_path: Path) -> None:
    found = compare(reference, recorded(tmp_path / "b", redrawn(Language(), "up.weight")))
    assert found.verdict == "suspect"
    assert found.first is not None and (found.first.key.kind, found.first.key.name) == ("start", "up.weight")


def test_what_a_trace_shows_by_itself_is_suspect_from_other_weights_too(reference: Path, tmp_path: Path) -> None:
    b = recorded(tmp_path / "b", redrawn(Language(), "up", "down", "word", "output"))
    lines = (b / "rank-00000/records.jsonl").read_text().splitlines()
    position = next(i for i, line in enumerate(lines) if '"kind": "grad"' in line and "down.bias" in line)
    record = json.loads(lines[position])
    record["at"] = [record["at"][0]] * 2  # a second holder, of what another record's box has
    assert record["shape"] == [WIDTH]
    (b / "rank-00000/records.jsonl").write_text(
        "\n".join([*lines[:position], json.dumps(record), *lines[position + 1 :]])
    )
    from safetensors.torch import load_file, save_file

    file = b / "rank-00000" / f"{record['file']:06d}.safetensors"
    tensors = load_file(file)
    save_file({**tensors, f"{position}.1": 2 * tensors[f"{position}.0"]}, file)
    found = compare(reference, b)
    assert found.first is not None and "down.bias" in found.first.key.name and "replicas" in found.first.why


def test_vocabularies_padded_differently_are_compared_up_to_the_smaller(
    reference: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    b = recorded(tmp_path / "b", Language(padded=16))
    assert main(["compare", str(reference), str(b), "--report", str(tmp_path / "page.html")]) == 0
    printed = capsys.readouterr().out
    words = "the vocabularies are padded differently, A's to 12 and B's to 16: 12 are compared"
    assert f"nothing suspect, though not the same: {words}; the padded logits are in every loss" in printed
    assert "before the losses, no tensor is beyond what rounding explains" in printed
    assert words in (tmp_path / "page.html").read_text().replace("&#x27;", "'")
    found = compare(reference, b)
    assert found.verdict == "other vocabulary" and not found.unmapped
    rows = {(row.key.step, row.key.kind, row.key.name): row for row in found.rows}
    assert rows[0, "start", "output_layer.weight"].verdict == "identical"
    assert rows[0, "out", "output_layer"].shape == (4, 6, 12)
    assert rows[0, "out", "output_layer"].verdict in ("identical", "rounding")
    assert rows[0, "out", "model"].verdict == "other vocabulary"
    assert rows[0, "state.exp_avg", "word_embeddings.weight"].shape == (12, WIDTH)
    assert compare(b, reference).vocabulary == (16, 12)


def test_a_bug_before_the_losses_is_found_whatever_the_padding(reference: Path, tmp_path: Path) -> None:
    model = Language(padded=16)
    model.norm.eps = 0.1
    found = compare(reference, recorded(tmp_path / "b", model))
    assert found.first is not None and (found.first.key.kind, found.first.key.name) == ("settings", "eps norm")
    suspects = [(row.key.kind, row.key.name) for row in found.rows if row.verdict == "suspect"]
    assert suspects[1] == ("out", "norm")


def test_other_weights_and_another_vocabulary_are_one_sentence(
    reference: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    b = recorded(tmp_path / "b", redrawn(Language(padded=16), "up", "down", "output"))
    assert main(["compare", str(reference), str(b)]) == 1
    sentence = capsys.readouterr().out.splitlines()[-1]
    assert sentence.startswith("not rounding: the runs start from other weights: 5 of 6 parameters")
    assert "A's to 12 and B's to 16" in sentence


def test_any_other_shape_is_another_model(reference: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wider = recorded(tmp_path / "wider", Language(padded=16, width=6))
    assert main(["compare", str(reference), str(wider)]) == 2
    assert "different models: down.bias is [8] in A and [6] in B" in capsys.readouterr().err
