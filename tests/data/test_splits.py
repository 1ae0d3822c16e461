"""Splits by document hash: each document in one split for ever, in every row mode, found again in the cache."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from dataset_builders import write_dataset

from pretrain.config.sections import SplitsSection
from pretrain.data import row_modes
from pretrain.data.batches import RowSource
from pretrain.data.dataset.indexed_dataset import IndexedDataset
from pretrain.data.row_modes import open_rows
from pretrain.data.splits import Split, hash_documents, select, split_named
from pretrain.errors import DataError

SPLITS = SplitsSection(train=0.6, validation=0.3, test=0.1)
NAMES = ("train", "validation", "test")


def documents(count: int, seed: int = 0) -> list[list[list[int]]]:
    """Documents of 0 to 5 sentences; the first two tokens of each tell its number."""
    generator = np.random.default_rng(seed)
    return [
        [
            [5 + i // 90, 5 + i % 90],
            *(generator.integers(5, 95, size).tolist() for size in generator.integers(0, 30, 4)),
        ]
        if i % 17
        else []
        for i in range(count)
    ]


def read(source: RowSource) -> np.ndarray:
    ids, segment = source.fill(np.arange(source.num_rows))
    return ids[(segment > 0) & (ids >= 5)]


@pytest.fixture
def prefix(tmp_path: Path) -> Path:
    write_dataset(tmp_path / "a", documents(800))
    return tmp_path / "a"


def kept(prefix: Path, name: str) -> np.ndarray:
    dataset = IndexedDataset(prefix)
    return split_named(SPLITS, name).contains(hash_documents(dataset.tokens, dataset.document_offsets))


def test_every_document_is_in_exactly_one_split_and_shares_are_near(prefix: Path) -> None:
    members = [kept(prefix, name) for name in NAMES]
    assert (np.sum(members, axis=0) == 1).all()
    filled = np.diff(IndexedDataset(prefix).document_offsets) > 0
    for is_kept, share in zip(members, (0.6, 0.3, 0.1), strict=True):
        assert abs(is_kept[filled].mean() - share) < 0.06


@pytest.mark.parametrize("shares", [(1.0, 0.0, 0.0), (0.9, 0.1, 0.0), (0.7, 0.2, 0.1), (0.1, 0.2, 0.7)])
def test_splits_cover_all_hashes_without_overlap(shares: tuple[float, ...]) -> None:
    splits = SplitsSection(**dict(zip(NAMES, shares, strict=True)))
    edges = np.array([0, 1, 2**63, 2**64 - 1, *(int(f * 2**64) for f in (0.1, 0.3, 0.7, 0.9))], np.uint64)
    hashes = np.concatenate((edges, edges - np.uint64(1), np.random.default_rng(0).integers(0, 2**64, 500, np.uint64)))
    members = [split_named(splits, name).contains(hashes) for name in NAMES if getattr(splits, name)]
    assert (np.sum(members, axis=0) == 1).all()


def test_a_document_stays_in_its_split_whatever_is_appended_and_in_whatever_dtype(tmp_path: Path, prefix: Path) -> None:
    write_dataset(tmp_path / "longer", [*documents(800), *documents(500, seed=9)])
    write_dataset(tmp_path / "wide", documents(800), dtype="int32")
    for name in NAMES:
        assert np.array_equal(kept(prefix, name), kept(tmp_path / "longer", name)[:800])
        assert np.array_equal(kept(prefix, name), kept(tmp_path / "wide", name))


@pytest.mark.parametrize("mode", ["stream", "document", "pack", "sentence"])
def test_rows_of_a_split_are_those_of_a_dataset_of_its_documents(tmp_path: Path, prefix: Path, mode: Any) -> None:
    for name in NAMES:
        own = [d for d, is_kept in zip(documents(800), kept(prefix, name), strict=True) if is_kept]
        write_dataset(tmp_path / name, own)
        found, expected = (
            RowSource([prefix], mode, 24, split=split_named(SPLITS, name)),
            RowSource([tmp_path / name], mode, 24),
        )
        assert (found.num_rows, found.num_tokens, found.fill_rate) == (
            expected.num_rows,
            expected.num_tokens,
            expected.fill_rate,
        )
        rows = np.arange(found.num_rows)
        for ours, theirs in zip(found.fill(rows), expected.fill(rows), strict=True):
            assert np.array_equal(ours, theirs)
        own_tokens = [IndexedDataset(p).tokens for p in (prefix, tmp_path / name)]
        firsts = [source.indexes[0].first_tokens(rows) for source in (found, expected)]
        if mode != "stream":  # there a row may begin with the separator after a document
            assert np.array_equal(own_tokens[0][firsts[0]], own_tokens[1][firsts[1]])


def test_tables_are_found_again_beside_the_data(prefix: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    split = split_named(SPLITS, "train")
    first = {mode: read(RowSource([prefix], mode, 24, split=split)) for mode in ("pack", "sentence")}
    assert sorted(path.name.split("-")[0] for path in Path(f"{prefix}.index").glob("*.index")) == [
        "hashes",
        "pack",
        "sentence",
    ]
    for name in ("hash_documents", "PackIndex.build", "SentenceIndex.build"):
        monkeypatch.setattr(f"pretrain.data.row_modes.{name}", lambda *_, **__: pytest.fail("built again"))
    for mode, tokens in first.items():
        assert np.array_equal(read(RowSource([prefix], mode, 24, split=split)), tokens)


def test_a_table_of_other_tokens_or_another_length_is_not_taken(tmp_path: Path, prefix: Path) -> None:
    split = split_named(SPLITS, "train")
    RowSource([prefix], "sentence", 24, split=split)
    changed = documents(800)
    changed[5][0][0] += 1
    write_dataset(prefix, changed, overwrite=True)
    own = [d for d, is_kept in zip(changed, kept(prefix, "train"), strict=True) if is_kept]
    write_dataset(tmp_path / "own", own)
    found = RowSource([prefix], "sentence", 24, split=split)
    assert np.array_equal(read(found), read(RowSource([tmp_path / "own"], "sentence", 24)))
    assert RowSource([prefix], "sentence", 40, split=split).seq_length == 40


def test_without_a_manifest_tables_stay_in_memory(prefix: Path) -> None:
    Path(f"{prefix}.json").unlink()
    rows = open_rows(IndexedDataset(prefix), "pack", 24)
    assert rows.num_rows > 0
    assert not Path(f"{prefix}.index").exists()


def test_another_folder_is_used_where_the_data_cannot_be_written(tmp_path: Path, prefix: Path) -> None:
    Path(f"{prefix}.index").write_text("in the way")
    RowSource([prefix], "pack", 24, cache_folder=tmp_path / "cache")
    assert len(list((tmp_path / "cache").glob("pack-*.index"))) == 1


def test_a_split_without_a_row_is_refused_and_named(prefix: Path) -> None:
    with pytest.raises(DataError, match=r"data\.splits\.test: 1 to 1 of them"):
        RowSource([prefix], "stream", 24, split=Split("test", 1.0, 1.0))


def test_runs_join_neighbours_and_drop_empty_documents() -> None:
    chosen = select(np.array([0, 4, 4, 9, 12, 20]), np.array([True, True, True, False, True]))
    assert chosen.is_kept.tolist() == [True, False, True, False, True]
    assert chosen.offsets.tolist() == [0, 4, 9, 17]
    assert chosen.runs.places.tolist() == [0, 9]
    assert chosen.runs.tokens.tolist() == [0, 12]
    assert row_modes.PackIndex.build(chosen.offsets, 8)
