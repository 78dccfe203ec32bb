"""Run files: presets, overrides, and what is refused with which words."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tpcheck.config.load import load_run, parse_run
from tpcheck.config.presets import PRESETS
from tpcheck.config.schema import ModelConfig, RunConfig
from tpcheck.errors import TpcheckError


@pytest.fixture
def run_file(tmp_path: Path) -> Path:
    file = tmp_path / "run.yaml"
    file.write_text("model: qwen3-tiny\nstrategy: stock\nsteps: 5\n")
    return file


def parameters(model: ModelConfig) -> int:
    """Parameters as the model's authors count them: without padding."""
    heads, groups = model.num_attention_heads * model.head_dim, model.num_query_groups * model.head_dim
    h, f = model.hidden_size, model.ffn_hidden_size
    norm = h * (2 if model.normalization == "LayerNorm" else 1)
    layer = h * (heads + 2 * groups) + heads * h + h * f * (3 if model.activation == "swiglu" else 2) + 2 * norm
    layer += 2 * model.head_dim if model.qk_layernorm else 0
    layer += heads + 2 * groups + h + f + h if model.bias else 0
    embeddings = h * model.vocab_size * (1 if model.tied else 2)
    positions = h * model.max_positions if model.positions == "learned" else 0
    return model.num_layers * layer + embeddings + positions + norm


@pytest.mark.parametrize(
    ("preset", "published"),
    [("qwen3-0.6b", 596_049_920), ("qwen3-8b", 8_190_735_360), ("gpt2-124m", 124_439_808)],
)
def test_presets_have_the_published_number_of_parameters(preset: str, published: int) -> None:
    assert parameters(ModelConfig.model_validate(preset)) == published


def test_tiny_preset_moves_vector_tails_at_every_tp() -> None:
    model = ModelConfig.model_validate("qwen3-tiny")
    assert all((model.ffn_hidden_size // tp) % 32 for tp in (1, 2, 4, 8))
    assert model.padded_vocab_size % 128 == 0


def test_padded_vocabulary_does_not_depend_on_tp() -> None:
    sizes = {parse_run({"tp": tp, "model": "gpt2-124m"}).model.padded_vocab_size for tp in (1, 2, 4)}
    assert sizes == {50304}


def test_overrides_reach_nested_keys_and_keep_the_preset(run_file: Path) -> None:
    config = load_run(run_file, ["tp=2", "optimizer.lr=1e-4", "model.num_layers=1", "data.kind=synthetic"])
    assert (config.tp, config.optimizer.lr, config.model.num_layers, config.data.kind) == (2, 1e-4, 1, "synthetic")
    assert config.model.hidden_size == PRESETS["qwen3-tiny"]["hidden_size"]


def test_resolved_configuration_reads_back_as_itself(run_file: Path) -> None:
    config = load_run(run_file)
    assert parse_run(config.model_dump(mode="json")) == config
    assert config.optimizer.decay_steps == 5


def test_microbatches_follow_from_the_batch_sizes() -> None:
    assert parse_run({"dp": 2, "micro_batch_size": 2, "global_batch_size": 12}).microbatches == 3


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"tp": 3}, 'or strategy="gather"'),
        ({"tp": 3, "strategy": "gather"}, "tp=3 does not divide num_attention_heads=8"),
        ({"leaves": 6}, "leaves=6 is not a power of two"),
        ({"tp": 8, "model": {"preset": "qwen3-tiny", "num_query_groups": 3}}, "one must be a multiple of the other"),
        ({"tp": 2, "sequence_parallel": True, "seq_length": 63}, "tp=2 does not divide seq_length=63"),
        ({"global_batch_size": 5}, "global_batch_size=5 is not a multiple of micro_batch_size * dp = 2 * 1"),
        ({"seq_length": 2048, "model": "gpt2-124m"}, "seq_length=2048 is above max_positions=1024"),
        ({"model": {"preset": "qwen3-tiny", "dropout": 0.1}}, "depends on tp: use 0, or strategy=stock"),
        ({"data": {"kind": "megatron"}}, "data.kind=megatron needs data.path"),
        ({"sequnce_parallel": True}, "unknown key sequnce_parallel: did you mean sequence_parallel?"),
        ({"model": {"preset": "qwen3-tiny", "layers": 2}}, "unknown key model.layers"),
        ({"optimizer": {"momentum": 0.9}}, "allowed are lr, min_lr"),
        ({"model": "qwen4"}, "unknown preset 'qwen4': use one of qwen3-tiny"),
        ({"model": {"num_layers": 2}}, "is missing: give it, or name a preset"),
        ({"dtype": "fp16"}, "dtype: Input should be 'bf16' or 'fp32', not 'fp16'"),
        ({"tp": 0}, "tp: Input should be greater than 0, not 0"),
    ],
)
def test_bad_settings_are_refused_in_one_line(settings: dict[str, object], words: str) -> None:
    with pytest.raises(TpcheckError) as refusal:
        parse_run(settings)
    assert words in str(refusal.value)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("steps", "write key=value"),
        ("optimizer.lr.x=1", "optimizer.lr: Input should be a valid number"),
        ("steps.x=1", "steps is a value"),
        ("tp=[", "is not YAML"),
        ("tp=2026-13-45", "is not YAML"),
    ],
)
def test_bad_overrides_are_refused(run_file: Path, override: str, words: str) -> None:
    with pytest.raises(TpcheckError, match=words):
        load_run(run_file, [override])


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: [", "is not YAML"),
        ("a: 2026-13-45", "is not YAML"),
        ("- 1", "holds a list"),
        (None, "No such file"),
        ("", None),
    ],
)
def test_unreadable_run_files_are_refused(tmp_path: Path, text: str | None, words: str | None) -> None:
    file = tmp_path / "run.yaml"
    if text is not None:
        file.write_text(text)
    if words is None:
        assert load_run(file) == RunConfig()
        return
    with pytest.raises(TpcheckError, match=words):
        load_run(file)


def test_reading_a_run_file_does_not_import_torch() -> None:
    code = "import sys, tpcheck.run.launch; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


BOMB = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{b}: &{b} [{', '.join(f'*{a}' for _ in range(10))}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (BOMB, "aliases written out"),
        ("a: " + "[" * 1500 + "]" * 1500, "deep"),
        ("a: &a [*a]", "an alias inside of what it stands for"),
        ("steps: 3\nsteps: 4", "the key 'steps' is given twice"),
        ("a: " + "x" * (1 << 21), "letters"),
        ("steps: 2026-13-45", "month must be in"),
        ("model: {preset: [qwen3-tiny]}", r"unknown preset \['qwen3-tiny'\]"),
        ("steps: true", "steps is not a matter of true"),
        ("optimizer: {lr: .inf}", "optimizer.lr: Input should be a finite number"),
        ("leaves: 1048576", "leaves: Input should be less than or equal to 1024"),
        ("model: {preset: qwen3-tiny, head_dim: 17}", "head_dim=17 is odd"),
        ("output: ''", "names no directory"),
        ('output: "a\\0b"', "names no directory"),
        ("output: /", "the root of all files"),
        (f"output: {'x' * 5000}", "5000 letters"),
        (f"dtype: {'x' * 10000}", "dtype: Input should be 'bf16' or 'fp32', not 'xxx"),
    ],
)
def test_what_cannot_be_meant_is_refused_in_a_short_line(text: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(text)
    with pytest.raises(TpcheckError, match=words) as refused:
        load_run(tmp_path / "run.yaml")
    assert len(str(refused.value).replace(str(tmp_path), "")) < 300


def test_anchors_and_merged_mappings_are_settings(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("optimizer: &o {lr: 1.0e-4}\nsteps: &n 3\nseed: *n\n")
    config = load_run(tmp_path / "run.yaml")
    assert (config.optimizer.lr, config.steps, config.seed) == (1e-4, 3, 3)
