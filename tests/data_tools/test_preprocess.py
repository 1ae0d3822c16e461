"""Datasets are the same however they are made; whatever goes wrong is said in one line and leaves nothing finished."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import time
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from corpora import TEXTS, run_program, write_bytes, write_jsonl, write_vocab
from project import ROOT, SAMPLE, SHARED

from data_tools.encoding.encode import EncodeOptions, parse_hash_range
from data_tools.preprocess import Report, preprocess
from data_tools.readers import ReadOptions
from pretrain.data.dataset.indexed_dataset import IndexedDataset
from pretrain.data.dataset.verification import verify
from pretrain.data.tokenizer.load import load_tokenizer
from pretrain.errors import ConfigError, DataError

RUN_OPTIONS = ("overwrite", "restart", "shard", "max_rejects", "memory", "journal_seconds")
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="no shared corpora; set TACO_SHARED_DATA")


def run(
    folder: Path, path: Path, name: str = "out", workers: int = 0, **options: object
) -> tuple[Report, IndexedDataset]:
    vocab = write_vocab(folder)
    how = {key: options.pop(key) for key in RUN_OPTIONS if key in options}
    chunk_bytes = options.pop("chunk_bytes", 4 << 20)
    reading = ReadOptions(chunk_bytes=chunk_bytes, on_error=options.pop("on_error", "stop"))  # type: ignore[arg-type]
    prefix = str(folder / name)
    report = preprocess(
        [str(path)], EncodeOptions(str(vocab), reading=reading, **options), prefix, workers=workers, **how
    )  # type: ignore[arg-type]
    return report, IndexedDataset(prefix)


def content(prefix: Path) -> dict[str, bytes]:
    """Every file of a dataset, the manifest without what names the inputs (and the hash that covers it)."""
    manifest = json.loads(Path(f"{prefix}.json").read_text())
    del manifest["command"], manifest["preprocessing"]["inputs"], manifest["self_xxh3_128"]
    files = {suffix: Path(f"{prefix}{suffix}").read_bytes() for suffix in (".bin", ".idx")}
    saved = {path.name: path.read_bytes() for path in Path(f"{prefix}.tokenizer").iterdir()}
    return {**files, **saved, ".json": json.dumps(manifest).encode()}


def leftovers(folder: Path) -> list[str]:
    """Files that are neither input nor vocabulary."""
    return sorted(
        path.name for path in folder.iterdir() if path.suffix not in (".jsonl", ".txt", ".gz", ".zst", ".model")
    )


def test_every_document_is_there_whole_and_without_separators(tmp_path: Path):
    report, dataset = run(tmp_path, write_jsonl(tmp_path / "x.jsonl", TEXTS))
    tokenizer = load_tokenizer(tmp_path / "vocab.txt")
    assert [dataset.document(i).tolist() for i in range(len(dataset))] == tokenizer.encode_batch(TEXTS)
    assert not np.isin(dataset.tokens, [tokenizer.special.cls, tokenizer.special.sep]).any()
    assert dataset.document(2).size == 700  # longer than any row: nothing is cut off
    assert (report.documents, report.tokens, report.dropped) == (len(TEXTS), dataset.num_tokens, {})
    assert dataset.manifest is not None
    assert dataset.manifest.tokenizer == tokenizer.info
    assert dataset.manifest.command[:3] == ("taco", "data", "preprocess")
    assert dataset.dtype == np.uint16
    assert verify(tmp_path / "out") == []
    assert load_tokenizer(tmp_path / "out.tokenizer").info == tokenizer.info


def test_output_is_the_same_for_any_number_of_workers(tmp_path: Path):
    path = write_jsonl(tmp_path / "x.jsonl", [f"{text} {i}" for i in range(60) for text in [*TEXTS, ""]])
    for workers in (0, 1, 2, 4):
        run(tmp_path, path, f"out{workers}", workers, chunk_bytes=512 + workers)
    expected = content(tmp_path / "out0")
    assert all(content(tmp_path / f"out{workers}") == expected for workers in (1, 2, 4))


def test_output_is_the_same_for_plain_and_compressed_input(tmp_path: Path):
    for suffix in ("", ".gz", ".zst"):
        run(tmp_path, write_jsonl(tmp_path / f"x.jsonl{suffix}", TEXTS), f"jsonl{suffix}")
    assert content(tmp_path / "jsonl") == content(tmp_path / "jsonl.gz") == content(tmp_path / "jsonl.zst")
    text = "\n\n".join(["the cat", "sat\non a mat", "and"]).encode()
    for suffix in ("", ".gz", ".zst"):
        _, dataset = run(tmp_path, write_bytes(tmp_path / f"x.txt{suffix}", text), f"txt{suffix}")
        assert len(dataset) == 3
    assert content(tmp_path / "txt") == content(tmp_path / "txt.gz") == content(tmp_path / "txt.zst")


def test_dropped_documents_are_counted_by_reason(tmp_path: Path):
    path = write_jsonl(tmp_path / "x.jsonl", ["the cat", "", " \n", "\x07\x07", "sat"])
    for workers in (0, 2):
        report, dataset = run(tmp_path, path, f"out{workers}", workers)
        assert len(dataset) == 2
        assert {reason: (item.documents, item.bytes) for reason, item in report.dropped.items()} == {
            "empty": (2, 2),
            "no_tokens": (1, 2),
        }
        assert dataset.manifest is not None
        assert dataset.manifest.dropped == report.dropped


def test_hash_ranges_split_without_gap_overlap_or_leak(tmp_path: Path):
    texts = [f"the cat {'abcdefghij'[i // 40]}{'abcdefghij' * 4}"[: 9 + i % 40] + "z" * (i // 40) for i in range(400)]
    texts += texts[:5]
    path = write_jsonl(tmp_path / "x.jsonl", texts)
    bounds = ["0:0.8", "0.8:0.95", "0.95:1"]
    parts = []
    for number, bound in enumerate(bounds):
        report, dataset = run(tmp_path, path, f"out{number}", hash_range=parse_hash_range(bound))
        parts.append([dataset.document(i).tobytes() for i in range(len(dataset))])
        assert report.dropped["outside_hash_range"].documents == len(texts) - len(dataset)
    assert sum(map(len, parts)) == len(texts)
    assert not set(parts[0]) & set(parts[1] + parts[2])
    assert not set(parts[1]) & set(parts[2])
    assert 280 < len(parts[0]) < 360
    more = write_jsonl(tmp_path / "more.jsonl", ["a new first document", *texts])
    _, dataset = run(tmp_path, more, "more", hash_range=parse_hash_range("0:0.8"))
    assert [dataset.document(i).tobytes() for i in range(len(dataset))][-len(parts[0]) :] == parts[0]


@pytest.mark.parametrize("text", ["0.5", "a:b", "0.5:0.2", "-1:1", "0:2", "0:1:2", "1/0:1", "0.5:0.5"])
def test_bad_hash_ranges_are_usage_errors(text: str):
    with pytest.raises(ConfigError, match="like 0:0.95"):
        parse_hash_range(text)
    assert parse_hash_range("0:0.95") == (Fraction(0), Fraction(95, 100))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(
    ("texts", "match"),
    [(["", " "], "x.jsonl: no document gave a token .documents: 2 empty.; .*--json-key"), ([], "is empty")],
)
def test_corpus_without_tokens_is_an_error(tmp_path: Path, texts: list[str], match: str, workers: int):
    with pytest.raises(DataError, match=match):
        run(tmp_path, write_jsonl(tmp_path / "x.jsonl", texts), workers=workers)
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize("workers", [0, 2])
def test_the_first_mistake_is_named_and_nothing_is_left(tmp_path: Path, workers: int):
    path = write_jsonl(tmp_path / "x.jsonl.gz", TEXTS * 30)
    lines = b'{"text": "a"}\n' * 30 + b'{"text": 5}\n' + b'{"text": "a"}\n' * 20
    data = write_bytes(path, lines).read_bytes()
    path.write_bytes(data[:-9])  # the reader, ahead of the workers, will find that the file is cut off
    with pytest.raises(DataError, match="x.jsonl.gz:31: key 'text': expected a string, found int"):
        run(tmp_path, path, workers=workers, chunk_bytes=64)
    assert leftovers(tmp_path) == []


def test_existing_output_is_kept_unless_overwriting(tmp_path: Path):
    first, second = write_jsonl(tmp_path / "x.jsonl", TEXTS), write_jsonl(tmp_path / "y.jsonl", ["mat"])
    run(tmp_path, first)
    before = content(tmp_path / "out")
    with pytest.raises(DataError, match="out.json: exists already.*overwrite"):
        run(tmp_path, second)
    bad = write_bytes(tmp_path / "z.jsonl", b'{"text": "a"}\n{"text": ')
    with pytest.raises(DataError, match="z.jsonl:2"):
        run(tmp_path, bad, overwrite=True)
    assert content(tmp_path / "out") == before
    _, dataset = run(tmp_path, second, overwrite=True)
    assert len(dataset) == 1
    assert leftovers(tmp_path) == ["out.bin", "out.idx", "out.json", "out.tokenizer"]


def test_failed_publication_leaves_the_old_dataset_and_is_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = write_jsonl(tmp_path / "x.jsonl", TEXTS)
    run(tmp_path, path)
    before = content(tmp_path / "out")

    def fail(*arguments: object, **options: object) -> None:
        raise DataError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr("pretrain.data.dataset.dataset_writer.IndexedDatasetWriter.finalize", fail)
        with pytest.raises(DataError, match="disk full"):
            run(tmp_path, path, cased=True, overwrite=True)
        assert content(tmp_path / "out") == before
        with pytest.raises(DataError, match="disk full"):
            run(tmp_path, path, "fresh")
    assert not any((tmp_path / f"fresh{suffix}").exists() for suffix in (".bin", ".idx", ".json", ".tokenizer"))
    report, _ = run(tmp_path, path, "fresh")
    assert report.documents == len(TEXTS)
    assert content(tmp_path / "fresh") == before
    assert sorted(path.name for path in tmp_path.glob("fresh*")) == [
        "fresh.bin",
        "fresh.idx",
        "fresh.json",
        "fresh.tokenizer",
    ]


def test_tokenizer_folder_of_someone_else_is_left_alone(tmp_path: Path):
    path = write_jsonl(tmp_path / "x.jsonl", TEXTS)
    (tmp_path / "out.tokenizer").mkdir()
    (tmp_path / "out.tokenizer" / "mine").touch()
    with pytest.raises(DataError, match="in the way"):
        run(tmp_path, path, overwrite=True)
    assert (tmp_path / "out.tokenizer" / "mine").exists()


def test_prefix_that_is_a_folder_or_below_a_file_is_refused(tmp_path: Path):
    path = write_jsonl(tmp_path / "x.jsonl", TEXTS)
    for prefix in (str(tmp_path), f"{tmp_path}/new/"):
        with pytest.raises(ConfigError, match="is a folder; give a name inside it"):
            preprocess([str(path)], EncodeOptions(str(write_vocab(tmp_path))), prefix)
    with pytest.raises(DataError, match="cannot be created"):
        run(tmp_path, path, "x.jsonl/out")
    run(tmp_path, path, "deep/er/out")


def test_workers_end_when_the_program_is_killed(tmp_path: Path):
    path = write_jsonl(tmp_path / "x.jsonl", ["the cat sat " * 4000] * 360)
    arguments = [
        "--input",
        path,
        "--tokenizer",
        write_vocab(tmp_path),
        "--output-prefix",
        tmp_path / "out",
        "--workers",
        "2",
    ]
    command = [sys.executable, str(ROOT / "data_tools" / "preprocess.py"), *map(str, arguments)]
    program = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": str(ROOT)})
    deadline = time.monotonic() + 60
    while not (tmp_path / "out.bin.tmp").exists() or not (tmp_path / "out.bin.tmp").stat().st_size:
        assert time.monotonic() < deadline
        assert program.poll() is None
        time.sleep(0.02)
    workers = Path(f"/proc/{program.pid}/task/{program.pid}/children").read_text().split()
    assert len(workers) >= 2
    program.kill()
    program.wait()
    while any(is_running(pid) for pid in workers):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert not (tmp_path / "out.json").exists()
    _, dataset = run(tmp_path, path)  # the same command recovers
    assert len(dataset) == 360
    assert leftovers(tmp_path) == ["out.bin", "out.idx", "out.json", "out.tokenizer"]


def is_running(pid: str) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_full_disk_is_an_error_and_temporaries_go(tmp_path: Path):
    path = write_jsonl(tmp_path / "x.jsonl", ["the cat sat " * 2000] * 10)
    arguments = ["--input", path, "--tokenizer", write_vocab(tmp_path), "--output-prefix", tmp_path / "out"]

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))

    done = run_program("preprocess", *arguments, preexec_fn=limit)
    assert done.returncode == 1, done.stderr
    assert done.stderr.startswith("error: ")
    assert "cannot be written" in done.stderr
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--input", "missing.jsonl", "--tokenizer", "vocab.txt", "--output-prefix", "out"], 1, ["missing.jsonl"]),
        (["--input", "x.jsonl", "--tokenizer", "no.txt", "--output-prefix", "out"], 1, ["no.txt", "cannot be read"]),
        (
            ["--input", "x.jsonl", "--tokenizer", "vocab.txt", "--output-prefix", "out", "--hash-range", "2"],
            2,
            ["LO:HI"],
        ),
        (["--input", "x.jsonl", "--tokenizer", "vocab.txt"], 2, ["--output-prefix"]),
    ],
)
def test_mistakes_are_one_line_and_an_exit_code(tmp_path: Path, arguments: list[str], code: int, words: list[str]):
    write_jsonl(tmp_path / "x.jsonl", TEXTS)
    write_vocab(tmp_path)
    done = run_program("preprocess", *arguments, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (code, "")
    assert all(word in done.stderr for word in words)
    assert "Traceback" not in done.stderr
    assert leftovers(tmp_path) == []


def test_program_reports_json_and_takes_several_files_after_one_flag(tmp_path: Path):
    files = [write_jsonl(tmp_path / f"{name}.jsonl", [name * 3, "the cat"], key="body") for name in "abc"]
    arguments = ["--input", *files[:2], "--json-key", "body", "--input", files[2], "--tokenizer", write_vocab(tmp_path)]
    done = run_program(
        "preprocess", *arguments, "--output-prefix", tmp_path / "new" / "out", "--workers", "2", "--json"
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert (report["documents"], report["input_files"], report["dropped"]) == (6, 3, {})
    assert report["tokens"] == IndexedDataset(tmp_path / "new" / "out").num_tokens
    assert all(Path(path).exists() for path in report["files"])


@pytest.mark.parametrize("name", ["preprocess", "train_tokenizer", "verify"])
def test_help_is_fast_and_imports_no_heavy_library(name: str):
    code = (
        "import sys, runpy; sys.argv = ['x', '--help']\n"
        f"try: runpy.run_path({str(ROOT / 'data_tools' / (name + '.py'))!r}, run_name='__main__')\n"
        "except SystemExit as end: assert not end.code\n"
        "heavy = {'torch', 'transformers', 'tokenizers', 'sentencepiece', 'numpy', 'pydantic'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    start = os.times().children_user
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    assert done.returncode == 0, done.stderr
    assert "Example:" in done.stdout
    assert os.times().children_user - start < 0.5


def test_preprocessing_imports_no_torch(tmp_path: Path):
    path, vocab = write_jsonl(tmp_path / "x.jsonl", TEXTS), write_vocab(tmp_path)
    code = (
        "import sys; from data_tools.preprocess import preprocess\n"
        "from data_tools.encoding.encode import EncodeOptions\n"
        f"preprocess([{str(path)!r}], EncodeOptions({str(vocab)!r}), {str(tmp_path / 'out')!r})\n"
        "heavy = {'torch', 'transformers', 'deepspeed'} & set(sys.modules); assert not heavy, heavy"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    assert done.returncode == 0, done.stderr


def test_saved_tokenizer_loads_in_transformers_and_agrees(tmp_path: Path):
    transformers = pytest.importorskip("transformers")
    _, dataset = run(tmp_path, write_jsonl(tmp_path / "x.jsonl", TEXTS))
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out.tokenizer")
    for number, text in enumerate(TEXTS):
        assert tokenizer.encode(text, add_special_tokens=False) == dataset.document(number).tolist()


def test_sample_corpus(tmp_path: Path):
    report, dataset = run(tmp_path, SAMPLE)
    assert (report.documents, len(dataset), report.dropped) == (514, 514, {})


@needs_shared
@pytest.mark.slow
@pytest.mark.parametrize(
    ("corpus", "vocab"),
    [
        ("zh_wiki", "bert-base-chinese/vocab.txt"),
        ("ja_aozora", "spm_google_test/test_ja_model.model"),
        ("zh_wiki", "spm_albert_like/30k-clean.model"),
    ],
)
def test_chinese_and_japanese_ids_equal_the_references(tmp_path: Path, corpus: str, vocab: str):
    import zstandard
    from sentencepiece import SentencePieceProcessor
    from transformers import BertTokenizerFast

    vocab_path, lines = SHARED / "vocab" / vocab, tmp_path / "x.jsonl"
    with zstandard.open(SHARED / "corpus" / f"{corpus}.jsonl.zst", "rt", encoding="utf-8") as file:
        lines.write_text("".join(line for line, _ in zip(file, range(100), strict=False)), encoding="utf-8")
    preprocess([str(lines)], EncodeOptions(str(vocab_path)), str(tmp_path / "out"), workers=2)
    dataset = IndexedDataset(tmp_path / "out")
    texts = [json.loads(line)["text"] for line in lines.read_text(encoding="utf-8").split("\n") if line]
    if vocab_path.suffix == ".model":
        expected = SentencePieceProcessor(model_file=str(vocab_path)).encode(texts)
    else:
        pieces = vocab_path.read_text(encoding="utf-8").rstrip("\n").split("\n")
        reference = BertTokenizerFast(vocab={piece: index for index, piece in enumerate(pieces)})
        expected = reference(texts, add_special_tokens=False).input_ids
    assert [dataset.document(i).tolist() for i in range(len(dataset))] == expected
