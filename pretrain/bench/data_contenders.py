"""The contenders of `taco bench data`, each in its own process: this project's preprocessing, its peers, and limits.

Each answers with CPU seconds of the work and, separately, of its start (imports, tokenizer), the bytes of text, and
whether its ids are those of the dataset that `taco` wrote before it in the same round.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from pretrain.bench.contest import cpu_seconds, peak_bytes, versions
from pretrain.errors import TacoError

# How much of the corpus a contender gets: all of it, or the first part, since the slow ones would need minutes.
CORPUS, PART, SMALL_PART, ONE_LINE = "corpus.jsonl", "part.jsonl", "small_part.jsonl", "one_line.jsonl"
_BATCH = 1000  # documents per call of a batch function: the default of datasets.map
_GROUP = 256  # the sequence length of TACO's authors
_BLOCK = 1 << 20
_SHORTEST = 1e-3  # seconds; on a very small corpus the work is less than starts differ by


@dataclass(frozen=True)
class Job:
    """What to measure: the folder with the corpus and its parts, and the tokenizer that every contender uses."""

    folder: Path
    tokenizer: str
    cased: bool

    @property
    def prefix(self) -> Path:
        """The dataset that `taco` writes."""
        return self.folder / "taco"


def measure(contender: str, job: Job) -> dict[str, Any]:
    """The answer of one contender: seconds, start_seconds, text_bytes, is_equal, peak_bytes and versions."""
    contenders: dict[str, Callable[[Job], dict[str, Any]]] = {
        "taco": lambda job: _preprocess(job, "taco"),
        "taco-sentences": lambda job: _preprocess(job, "taco-sentences", "--split-sentences"),
        "tokenizers": _tokenizers,
        "sentencepiece": _sentencepiece,
        "megatron": _megatron,
        "datasets": _datasets,
        "limit-read": _limit_read,
        "limit-parse": _limit_parse,
        "limit-tokenize": _limit_tokenize,
        "limit-sentences": _limit_sentences,
        "limit-write": _limit_write,
    }
    return {"is_equal": None, "versions": {}, **contenders[contender](job), "peak_bytes": peak_bytes()}


def text_bytes(path: Path) -> int:
    """UTF-8 bytes of all texts of a file of JSON lines."""
    return sum(len(text.encode()) for text in _texts(path))


def _texts(path: Path) -> Iterator[str]:
    import orjson

    with path.open("rb") as file:
        for line in file:
            yield orjson.loads(line)["text"]


def _batches(path: Path) -> Iterator[list[str]]:
    batch: list[str] = []
    for text in _texts(path):
        batch.append(text)
        if len(batch) == _BATCH:
            yield batch
            batch = []
    yield batch


class _Clock:
    """CPU time of the start, until `begin`, and of the work after it."""

    def __init__(self) -> None:
        self.start_seconds = self._begun = 0.0

    def begin(self) -> None:
        """Note that the work begins."""
        self.start_seconds = self._begun = cpu_seconds()

    def answer(self, corpus: Path, **more: Any) -> dict[str, Any]:
        """Note that the work on the texts of `corpus` has ended; returns its measurements."""
        seconds = cpu_seconds() - self._begun
        return {"seconds": seconds, "start_seconds": self.start_seconds, "text_bytes": text_bytes(corpus), **more}


# -- this project ------------------------------------------------------------------------------------------------------


def _preprocess(job: Job, name: str, *options: str) -> dict[str, Any]:
    """The program itself; its start is its cost on one document."""
    command = [sys.executable, "-m", "pretrain.cli", "data", "preprocess", "--tokenizer", job.tokenizer]
    command += ["--workers", "1", "--overwrite", *options, *(["--cased"] if job.cased else [])]
    start = _run([*command, "--input", str(job.folder / ONE_LINE), "--output-prefix", str(job.folder / "one_line")])
    prefix = job.folder / name
    seconds = _run([*command, "--input", str(job.folder / CORPUS), "--output-prefix", str(prefix)])
    return {
        "seconds": max(seconds - start, _SHORTEST),
        "start_seconds": start,
        "text_bytes": text_bytes(job.folder / CORPUS),
        "is_equal": _is_sound(prefix, job),
        "versions": versions("numpy", "orjson"),
    }


def _run(command: Sequence[str]) -> float:
    before = cpu_seconds()
    answer = subprocess.run(command, capture_output=True, text=True, check=False)
    if answer.returncode:
        raise TacoError(f"{' '.join(command)} failed with exit code {answer.returncode}:\n{answer.stderr[-2000:]}")
    return cpu_seconds() - before


def _is_sound(prefix: Path, job: Job) -> bool:
    """Whether a dataset matches its hashes and, with WordPiece, has the tokens of the one without split sentences."""
    from pretrain.data.dataset.indexed_dataset import IndexedDataset
    from pretrain.data.dataset.verification import verify

    if verify(prefix):
        return False
    dataset, whole = IndexedDataset(prefix), IndexedDataset(job.prefix)
    return not job.tokenizer.endswith(".txt") or np.array_equal(dataset.tokens, whole.tokens)


def _documents(job: Job) -> Iterator[np.ndarray]:
    from pretrain.data.dataset.indexed_dataset import IndexedDataset

    dataset = IndexedDataset(job.prefix)
    return map(dataset.document, range(len(dataset)))


def _is_equal(job: Job, documents: Iterator[np.ndarray]) -> bool:
    """Whether `documents` are the first of the dataset, except for empty ones, which preprocessing drops."""
    ours = _documents(job)
    return all(np.array_equal(ids, next(ours, ())) for ids in documents if len(ids))


def _is_equal_dataset(job: Job, prefix: Path) -> bool:
    from pretrain.data.dataset.indexed_dataset import IndexedDataset

    dataset = IndexedDataset(prefix)
    return len(dataset) > 0 and _is_equal(job, map(dataset.document, range(len(dataset))))


class _PlainWriter:
    """The least that a peer must do to write a dataset: ids to PREFIX.bin, batch by batch, then the index."""

    def __init__(self, prefix: Path, dtype: np.dtype) -> None:
        self._prefix, self._dtype, self._lengths = prefix, dtype, [np.zeros(0, np.int64)]
        self._file = Path(f"{prefix}.bin").open("wb")  # noqa: SIM115 - closed by `close`

    def add(self, documents: Sequence[Sequence[int]]) -> None:
        lengths = np.array([len(ids) for ids in documents if len(ids)], np.int64)
        flat = np.fromiter(chain.from_iterable(documents), self._dtype, int(lengths.sum()))
        self._file.write(flat.tobytes())
        self._lengths.append(lengths)

    def close(self) -> None:
        """Writes PREFIX.idx in Megatron's layout, one sequence per document."""
        from pretrain.data.dataset.dataset_format import CODE_OF_DTYPE, MAGIC, VERSION

        self._file.close()
        lengths = np.concatenate(self._lengths)
        ends = np.cumsum(lengths) * self._dtype.itemsize
        counts = np.array([lengths.size, lengths.size + 1], "<u8")
        with Path(f"{self._prefix}.idx").open("wb") as file:
            file.write(MAGIC + np.array([VERSION], "<u8").tobytes() + bytes([CODE_OF_DTYPE[self._dtype.name]]))
            file.write(counts.tobytes() + lengths.astype("<i4").tobytes())
            file.write((ends - lengths * self._dtype.itemsize).astype("<i8").tobytes())
            file.write(np.arange(lengths.size + 1, dtype="<i8").tobytes())


# -- peers -------------------------------------------------------------------------------------------------------------


def _tokenizers(job: Job) -> dict[str, Any]:
    """Hugging Face tokenizers' fastest batch call, orjson, and ids written a batch at a time."""
    from tokenizers import BertWordPieceTokenizer

    from pretrain.data.tokenizer.base import best_dtype

    library = BertWordPieceTokenizer(job.tokenizer, lowercase=not job.cased)
    encode = library._tokenizer.encode_batch_fast
    writer, clock = _PlainWriter(job.folder / "tokenizers", best_dtype(library.get_vocab_size())), _Clock()
    clock.begin()
    for batch in _batches(job.folder / PART):
        writer.add([encoding.ids for encoding in encode(batch, add_special_tokens=False)])
    writer.close()
    answer = clock.answer(job.folder / PART, versions=versions("tokenizers"))
    return {**answer, "is_equal": _is_equal_dataset(job, job.folder / "tokenizers")}


def _sentencepiece(job: Job) -> dict[str, Any]:
    """The sentencepiece library a batch at a time, orjson, and ids written a batch at a time."""
    from sentencepiece import SentencePieceProcessor

    from pretrain.data.tokenizer.base import best_dtype

    processor = SentencePieceProcessor(model_file=job.tokenizer)
    writer, clock = _PlainWriter(job.folder / "sentencepiece", best_dtype(processor.get_piece_size())), _Clock()
    clock.begin()
    for batch in _batches(job.folder / PART):
        writer.add(processor.encode(batch, out_type=int, num_threads=1))
    writer.close()
    answer = clock.answer(job.folder / PART, versions=versions("sentencepiece"))
    return {**answer, "is_equal": _is_equal_dataset(job, job.folder / "sentencepiece")}


def _bert_tokenizer(job: Job) -> Any:
    from transformers import BertTokenizerFast

    return BertTokenizerFast(job.tokenizer, do_lower_case=not job.cased, model_max_length=10**9)


def _megatron(job: Job) -> dict[str, Any]:
    """As Megatron's preprocess_data.py: json.loads per line, BertTokenizerFast per document, and its builder."""
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    from pretrain.data.tokenizer.base import best_dtype

    tokenizer, prefix, clock = _bert_tokenizer(job), job.folder / "megatron", _Clock()
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=best_dtype(len(tokenizer)).type)
    clock.begin()
    with (job.folder / PART).open(encoding="utf-8") as file:
        for line in file:
            ids = tokenizer(json.loads(line)["text"], add_special_tokens=False)["input_ids"]
            if ids:
                builder.add_document(ids, [len(ids)])
    builder.finalize(f"{prefix}.idx")
    answer = clock.answer(job.folder / PART, versions=versions("megatron-core", "transformers"))
    return {**answer, "is_equal": _is_equal_dataset(job, prefix)}


def _datasets(job: Job) -> dict[str, Any]:
    """The route of TACO's authors: datasets.map to ids with a mask of the special ones, then to groups of 256."""
    from datasets import disable_progress_bars, load_dataset

    disable_progress_bars()
    tokenizer, clock = _bert_tokenizer(job), _Clock()
    scratch = job.folder / f"datasets-{os.getpid()}"

    def tokenize(examples: dict[str, list[Any]]) -> Any:
        return tokenizer(examples["text"], return_special_tokens_mask=True)

    def group(examples: dict[str, list[Any]]) -> dict[str, list[Any]]:
        joined = {name: [value for row in rows for value in row] for name, rows in examples.items()}
        end = len(joined["input_ids"]) // _GROUP * _GROUP
        return {name: [row[i : i + _GROUP] for i in range(0, end, _GROUP)] for name, row in joined.items()}

    clock.begin()
    rows = load_dataset("json", data_files=str(job.folder / SMALL_PART), cache_dir=str(scratch / "cache"))["train"]
    rows = rows.map(tokenize, batched=True, remove_columns=rows.column_names).map(group, batched=True)
    rows.save_to_disk(str(scratch / "rows"))
    answer = clock.answer(job.folder / SMALL_PART, versions=versions("datasets", "transformers"))
    return {**answer, "is_equal": _is_grouped_equal(job, rows["input_ids"], tokenizer)}


def _is_grouped_equal(job: Job, rows: Sequence[Sequence[int]], tokenizer: Any) -> bool:
    """Whether the groups are our documents, framed, each thousand of them joined and cut every 256 tokens."""
    cls, sep, ours = tokenizer.cls_token_id, tokenizer.sep_token_id, _documents(job)
    expected: list[list[int]] = []
    for batch in _batches(job.folder / SMALL_PART):
        line = [token for _ in batch for token in (cls, *next(ours).tolist(), sep)]
        expected += [line[i : i + _GROUP] for i in range(0, len(line) // _GROUP * _GROUP, _GROUP)]
    return list(map(list, rows)) == expected


# -- limits of the machine and of the parts ----------------------------------------------------------------------------


def _limit_read(job: Job) -> dict[str, Any]:
    """Reading the file, a megabyte at a time."""
    clock = _Clock()
    clock.begin()
    with (job.folder / CORPUS).open("rb") as file:
        while file.read(_BLOCK):
            pass
    return clock.answer(job.folder / CORPUS)


def _limit_parse(job: Job) -> dict[str, Any]:
    """orjson on every line."""
    clock = _Clock()
    clock.begin()
    for _ in _texts(job.folder / CORPUS):
        pass
    return clock.answer(job.folder / CORPUS, versions=versions("orjson"))


def _limit_tokenize(job: Job) -> dict[str, Any]:
    """This project's tokenizer alone, on texts in memory."""
    from pretrain.data.tokenizer.load import load_tokenizer

    tokenizer, clock = load_tokenizer(job.tokenizer, cased=job.cased), _Clock()
    batches = list(_batches(job.folder / CORPUS))
    clock.begin()
    encoded = [tokenizer.encode(batch) for batch in batches]
    answer = clock.answer(job.folder / CORPUS)
    ids = np.concatenate([ids for ids, _ in encoded])
    return {**answer, "is_equal": np.array_equal(ids, np.concatenate(list(_documents(job))))}


def _limit_sentences(job: Job) -> dict[str, Any]:
    """This project's sentence splitter alone, on texts in memory."""
    from pretrain.data.sentences import split_sentences

    batches, clock = list(_batches(job.folder / CORPUS)), _Clock()
    clock.begin()
    splits = [split_sentences(batch) for batch in batches]
    answer = clock.answer(job.folder / CORPUS)
    sentences = chain.from_iterable(part for part, _ in splits)
    is_equal = _without_blanks(sentences) == _without_blanks(_texts(job.folder / CORPUS))
    return {**answer, "is_equal": is_equal}


def _without_blanks(texts: Iterable[str]) -> int:
    """A hash of all characters except whitespace."""
    import xxhash

    digest = xxhash.xxh64()
    for text in texts:
        digest.update("".join(text.split()).encode())
    return digest.intdigest()


def _limit_write(job: Job) -> dict[str, Any]:
    """This project's writer alone: hashed chunks and index of tokens in memory."""
    from pretrain.data.dataset.dataset_writer import IndexedDatasetWriter
    from pretrain.data.dataset.indexed_dataset import IndexedDataset

    dataset, clock = IndexedDataset(job.prefix), _Clock()
    assert dataset.manifest is not None
    tokens, lengths = np.array(dataset.tokens), np.diff(dataset.document_offsets)
    clock.begin()
    with IndexedDatasetWriter(job.folder / "written", dataset.dtype, overwrite=True) as writer:
        writer.add_documents(tokens, lengths)
        writer.finalize(tokenizer=dataset.manifest.tokenizer)
    answer = clock.answer(job.folder / CORPUS)
    return {**answer, "is_equal": _is_equal_dataset(job, job.folder / "written")}
