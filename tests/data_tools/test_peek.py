"""A row that is shown is the row that training gets; documents are the texts that were put in."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from corpora import TEXTS, run_program, write_jsonl, write_vocab
from rich.console import Console

from data_tools.encoding.encode import EncodeOptions
from data_tools.preprocess import preprocess
from data_tools.views import row_view
from data_tools.views.row_page import _show_row
from data_tools.views.row_view import Anchor, Other, RowView, Token, find_place, view_row
from pretrain.config.load import resolve_config
from pretrain.config.sections import RunConfig
from pretrain.data.batches import RowSource, open_batches
from pretrain.data.tokenizer.load import load_tokenizer
from pretrain.errors import ConfigError

needs_torch = pytest.mark.skipif(find_spec("torch") is None, reason="pairs are drawn by torch, which is not installed")


@pytest.fixture
def prefix(tmp_path: Path) -> str:
    path = write_jsonl(tmp_path / "x.jsonl", [*TEXTS, "a cat and a mat, cab dad"] * 3)
    preprocess([str(path)], EncodeOptions(str(write_vocab(tmp_path))), str(tmp_path / "out"))
    return str(tmp_path / "out")


def settings(prefix: str, *changes: str) -> RunConfig:
    tree = {"run": {"output_dir": "."}, "data": {"train": [prefix], "seq_length": 32}, "train": {"micro_batch_size": 4}}
    return resolve_config(Path("test"), tree, changes)


def look(config: RunConfig, row: int, epoch: int = 0, anchors: list[int] | None = None) -> RowView:
    rows = RowSource(config.data.train, config.data.row_mode, config.data.seq_length)
    micro_batch, place = find_place(config, rows, row, epoch)
    return view_row(config, rows, load_tokenizer(config.data.train[0] + ".tokenizer"), micro_batch, place, anchors)


@pytest.mark.parametrize("piece", [3, 1 << 20])
@pytest.mark.parametrize("mode", ["stream", "document"])
def test_every_row_is_found_where_training_meets_it(
    prefix: str, monkeypatch: pytest.MonkeyPatch, mode: str, piece: int
) -> None:
    monkeypatch.setattr(row_view, "_PIECE", piece)
    config = settings(prefix, f"data.row_mode={mode}", "objective.masking=span")
    rows = RowSource([prefix], mode, 32)  # type: ignore[arg-type]
    batches = open_batches(config, rows, seed=config.run.seed)
    plain, segment = rows.fill(np.arange(rows.num_rows))
    for epoch in (0, 2):
        for row in range(rows.num_rows):
            view = look(config, row, epoch)
            assert (view.row, view.epoch) == (row, epoch)
            batch = batches.micro_batch(view.micro_batch)
            assert [token.id for token in view.tokens] == batch.input_ids_BL[view.place].tolist()
            assert [token.label for token in view.tokens] == plain[row].tolist()
            assert [token.document > 0 for token in view.tokens] == (segment[row] > 0).tolist()
            chosen = sum(token.kind in ("masked", "random", "kept") for token in view.tokens)
            used = (batch.masked_label_M >= 0) & (batch.masked_index_M // 32 == view.place)
            assert chosen == used.sum()


def test_kinds_are_those_of_the_tokens(prefix: str) -> None:
    config = settings(prefix, "data.row_mode=document", "objective.mask_rate=0.6")
    special = RowSource([prefix], "document", 32).tokenizer.special
    seen = set()
    for row in range(RowSource([prefix], "document", 32).num_rows):
        for token in look(config, row).tokens:
            seen.add(token.kind)
            expected = {
                "masked": token.id == special.mask != token.label,
                "random": token.id not in (special.mask, token.label),
                "kept": token.id == token.label,
                "padding": token.id == token.label == special.pad and token.document == 0,
                "special": token.id == token.label and token.id in (special.cls, special.sep),
                "text": token.id == token.label,
            }
            assert expected[token.kind], token
    assert seen == {"masked", "random", "kept", "padding", "special", "text"}


@needs_torch
def test_pairs_are_those_of_training(prefix: str) -> None:
    import torch

    from pretrain.objectives.taco import sample_pairs

    config = settings(prefix, "objective.num_negatives=7", "objective.anchors=masked", "run.seed=99")
    rows = RowSource([prefix], "stream", 32)
    view = look(config, 3, anchors=list(range(32)))
    batch = open_batches(config, rows, seed=99).micro_batch(view.micro_batch)
    positive_BL, negative_BLK = sample_pairs(
        torch.from_numpy(batch.valid_BL),
        window=2,
        num_negatives=7,
        seed=99,
        micro_batch_index=view.micro_batch,
        segment_BL=torch.from_numpy(batch.segment_BL),
    )
    assert view.anchors is not None
    for anchor, token in zip(view.anchors, view.tokens, strict=True):
        assert anchor.positive is not None
        assert anchor.positive.column == positive_BL[view.place, anchor.column]
        flat = [other.row * 32 + other.column for other in anchor.negatives]
        assert flat == negative_BLK[view.place, anchor.column].tolist()
        assert all(other.row != view.place for other in anchor.negatives)
        assert anchor.negatives[0].id == batch.input_ids_BL[anchor.negatives[0].row, anchor.negatives[0].column]
        assert anchor.is_anchor == (token.kind in ("masked", "random", "kept"))
    some = look(config, 3).anchors or ()
    assert len(some) == 3
    assert all(anchor.is_anchor for anchor in some)
    assert look(settings(prefix, "objective.contrastive_weight=0"), 3).anchors == ()


def test_without_torch_a_row_is_shown_and_its_pairs_are_said_to_be_left_out(
    prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = settings(prefix)
    full = look(config, 3)
    monkeypatch.setitem(sys.modules, "torch", None)
    view = look(config, 3)
    assert (view.tokens, view.anchors) == (full.tokens, None)
    console = Console(record=True, width=120, highlight=False)
    _show_row(console, view, config)
    assert "TACO's pairs are not shown: torch" in console.export_text()
    assert look(settings(prefix, "objective.contrastive_weight=0"), 3).anchors == ()
    with pytest.raises(ModuleNotFoundError, match="torch"):
        look(config, 3, anchors=[5])


def test_what_does_not_exist_is_refused(prefix: str) -> None:
    config = settings(prefix)
    with pytest.raises(ConfigError, match=r"--row 10000: in row mode stream .* rows, 0 to"):
        look(config, 10_000)
    with pytest.raises(ConfigError, match="--anchor 32: a row has columns 0 to 31"):
        look(config, 0, anchors=[3, 32])
    done = run_program("peek", prefix, "--row", "99999")
    assert (done.returncode, done.stderr.startswith("error: --row 99999")) == (2, True)
    done = run_program("peek", prefix, "--document", "99")
    assert done.returncode == 2
    assert "has documents 0 to 17" in done.stderr
    done = run_program("peek", prefix, "--micro-batch", "0", "--place", "8")
    assert "--place 8: train.micro_batch_size is 8" in done.stderr
    assert run_program("peek", prefix, "--row", "0", "objective.maskin=span").returncode == 2


@pytest.mark.slow
def test_documents_and_manifest_are_shown_in_words(prefix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    done = run_program("peek", prefix, "--documents", "2", "--document", "3", "--document", "2")
    assert done.returncode == 0, done.stderr
    assert "\x1b" not in done.stdout
    assert "out: 18 documents, 18 sequences" in done.stdout
    assert "wordpiece vocab.txt, 64 pieces, uncased" in done.stdout
    assert "document 0: 3 tokens\nthe cat sat\ntokens: the cat sat\n" in done.stdout
    assert "c ##a ##f ##e 中 文 a" in done.stdout
    assert "... and 500 more" in done.stdout
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert "\x1b[" in run_program("peek", prefix, "--row", "1", "--seq-length", "32").stdout


@needs_torch
def test_a_row_is_shown_without_colour_where_there_is_no_terminal(prefix: str) -> None:
    done = run_program(
        "peek", prefix, "--row", "1", "--row-mode", "document", "--seq-length", "32", "--seed", "5", "--anchor", "1"
    )
    assert done.returncode == 0, done.stderr
    assert "row 1 in epoch 0: place" in done.stdout
    assert "(document rows of 32 tokens, seed 5, token masking)" in done.stdout
    assert "[PAD] x " in done.stdout
    assert "TACO, column 1 " in done.stdout
    assert "<1:" in done.stdout


@pytest.mark.slow
def test_json_and_a_run_with_several_datasets(prefix: str, tmp_path: Path) -> None:
    run = tmp_path / "run.yaml"
    run.write_text(
        f"run: {{output_dir: x}}\ndata: {{train: [{prefix}, {prefix}], seq_length: 16}}\n"
        "objective: {masking: whole_word}\n"
    )
    done = run_program("peek", prefix, "--config", run, "--micro-batch", "2", "--place", "1", "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["settings"]["data.train"] == [prefix, prefix]
    assert report["settings"]["objective.masking"] == "whole_word"
    assert (report["row"]["micro_batch"], report["row"]["place"]) == (2, 1)
    assert len(report["row"]["tokens"]) == 16
    assert report["dataset"]["manifest"]["tokenizer"]["vocab_size"] == 64
    assert report["documents"] == []


def test_without_manifest_ids_are_shown(prefix: str) -> None:
    Path(f"{prefix}.json").unlink()
    done = run_program("peek", prefix)
    assert done.returncode == 0, done.stderr
    assert "manifest   none" in done.stdout
    assert "tokens: 5 6 7" in done.stdout


def test_only_pairs_need_torch(prefix: str) -> None:
    code = (
        f"import sys\nfrom data_tools.peek import app\n"
        f"try: app(['{prefix}', '--row', '0', '--seq-length', '16', 'objective.contrastive_weight=0'])\n"
        "except SystemExit: print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.endswith("False\n"), done.stdout + done.stderr


def test_words_are_joined_and_marks_stand_where_a_row_begins_inside_a_word(capsys: pytest.CaptureFixture[str]) -> None:
    def token(column: int, piece: str, kind: str = "text", label: str | None = None, document: int = 1) -> Token:
        return Token(column, 0, piece, 0, label or piece, kind, document, (label or piece).startswith("##"))  # type: ignore[arg-type]

    tokens = (
        token(0, "[CLS]", "special"),
        token(1, "##ny"),
        token(2, "un"),
        token(3, "##believ"),
        token(4, "[MASK]", "masked", "##able"),
        token(5, "##s"),
        token(6, "[SEP]", "special"),
        token(7, "\u2581the", document=2),
        token(8, "[PAD]", "padding", document=0),
        token(9, "[PAD]", "padding", document=0),
    )
    config = resolve_config(Path("test"), {"run": {"output_dir": "."}, "data": {"train": ["x"]}})
    other = Other(1, 2, 0, "far")
    anchors = (Anchor(3, "##believ", True, Other(0, 2, 0, "un"), (other,) * 12), Anchor(1, "##ny", False, None, ()))
    _show_row(Console(width=120), RowView(3, 0, 1, 0, tokens, anchors), config)
    out = capsys.readouterr().out
    assert "    0  [CLS] <1:##ny> un<3:believ> {[MASK]|##able}s [SEP]\n    7  the\n    8  [PAD] x 2\n" in out
    assert "TACO, column 3 ##believ: positive at column 2 (-1) un; 12 negatives (row.column): 1.2 far" in out
    assert "and 2 more" in out
    assert "TACO, column 1 ##ny (no anchor of this run): has no positive" in out


def test_only_the_column_is_dim_in_a_coloured_row(capsys: pytest.CaptureFixture[str]) -> None:
    tokens = (
        Token(0, 2, "[CLS]", 2, "[CLS]", "special", 1, False),
        Token(1, 7, "cat", 7, "cat", "text", 1, False),
        Token(2, 4, "[MASK]", 8, "sat", "masked", 1, False),
    )
    config = resolve_config(Path("test"), {"run": {"output_dir": "."}, "data": {"train": ["x"]}})
    console = Console(width=120, force_terminal=True, color_system="standard")
    _show_row(console, RowView(3, 0, 1, 0, tokens, ()), config)
    out = capsys.readouterr().out
    assert "\x1b[2m    0  \x1b[0m\x1b[1;36m[CLS]\x1b[0m cat \x1b[30;43m{[MASK]|sat}\x1b[0m\n" in out
