"""`taco bench data`: megabytes of text per CPU second from JSON lines to a token dataset, against three peers.

    taco             `taco data preprocess` with one worker, the whole program
    taco-sentences   the same with --split-sentences
    megatron         json.loads, BertTokenizerFast, megatron-core's builder, one document at a time
    tokenizers       Hugging Face tokenizers' encode_batch_fast, a thousand documents at a time
    datasets         the route of TACO's authors: datasets.map, ids in groups of 256
    sentencepiece    the sentencepiece library, a thousand documents at a time (for a .model)
    limit-...        reading the file, parsing it, tokenizing, splitting into sentences and writing, each alone

Every contender runs in a separate process; its start-up (imports, tokenizer) is reported separately. Slow ones get only
the first part of the corpus. Every peer's ids are compared with ours.
"""

from __future__ import annotations

import io
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from pretrain.bench.contest import ONE_CORE, Runs, machine, medians, publish, run_contest, show_quartiles, spread
from pretrain.cli import new_program, run_program
from pretrain.errors import ConfigError, DataError, TacoError

app = new_program()

OURS = ("taco", "taco-sentences")
PEERS = {".txt": ("megatron", "tokenizers", "datasets"), ".model": ("sentencepiece",)}
LIMITS = ("limit-read", "limit-parse", "limit-tokenize", "limit-sentences", "limit-write")
_SAMPLE = Path(__file__).parents[2] / "data_tools" / "sample_corpus" / "public_domain_en.jsonl.zst"


@app.command(epilog="Example: taco bench data --input books.jsonl.zst --tokenizer vocab.txt --json")
def data(
    input: Annotated[
        Path | None, typer.Option(help="JSON lines, plain, .gz or .zst; default: the sample corpus, repeated")
    ] = None,
    tokenizer: Annotated[Path | None, typer.Option(help="vocab.txt or SentencePiece .model; default: learnt")] = None,
    cased: Annotated[bool, typer.Option("--cased", help="keep capitals and accents (vocab.txt only)")] = False,
    json_key: Annotated[str, typer.Option(help="key of the text in a JSON line")] = "text",
    megabytes: Annotated[float, typer.Option(min=0.01, help="size of the text; peers get a part of it")] = 60.0,
    rounds: Annotated[int, typer.Option(min=1, help="processes per contender")] = 3,
    quick: Annotated[bool, typer.Option("--quick", help="one round on little text, to see that it works")] = False,
    out: Annotated[Path | None, typer.Option(help="also write the JSON here")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="machine-readable output")] = False,
    contender: Annotated[str | None, typer.Option(hidden=True, help="measure this one in this process")] = None,
    folder: Annotated[Path, typer.Option(hidden=True, help="where contenders find the corpus")] = Path(),
) -> None:
    """Measure text per CPU second of preprocessing against megatron-core, tokenizers and datasets."""
    if contender is not None:
        from pretrain.bench.data_contenders import Job, measure

        typer.echo(json.dumps(measure(contender, Job(folder, str(tokenizer), cased))))
        return
    if quick:
        megabytes, rounds = min(megabytes, 0.3), 1
    with tempfile.TemporaryDirectory(prefix="taco-bench-") as scratch:
        sizes = prepare_corpus(Path(scratch), input, json_key, megabytes)
        tokenizer_path = tokenizer or _learn_vocabulary(Path(scratch))
        arguments = [f"--folder={scratch}", f"--tokenizer={tokenizer_path}", *(["--cased"] if cased else [])]
        contenders = _contenders(tokenizer_path)
        runs = run_contest("pretrain.bench.data", contenders, arguments, rounds, ONE_CORE)
    setting = {"input": str(input) if input else "sample corpus, repeated", "tokenizer": str(tokenizer or "learnt")}
    report = summarise({**setting, "cased": cased, **sizes}, runs)
    publish(report, table(report), out, as_json=as_json)


def _contenders(tokenizer: Path) -> tuple[str, ...]:
    """Ours first: the others are compared with the dataset that it writes."""
    if tokenizer.suffix not in PEERS:
        raise ConfigError(f"--tokenizer {tokenizer}: expected a vocab.txt or a SentencePiece .model")
    return (*OURS, *PEERS[tokenizer.suffix], *LIMITS)


def prepare_corpus(folder: Path, source: Path | None, json_key: str, megabytes: float) -> dict[str, int]:
    """Writes the corpus and its parts as plain JSON lines into `folder`; returns how many bytes of text they hold.

    The sample corpus is repeated until there is enough; a given file is used once.

    Raises:
        DataError: the file cannot be read, or a line holds no text under `json_key`.
    """
    from pretrain.bench.data_contenders import CORPUS, ONE_LINE, PART, SMALL_PART

    # Peers at 2 MB/s and at 0.5 MB/s get as much as they can process in a few seconds.
    limits = {CORPUS: megabytes * 1e6, PART: min(megabytes, 6.0) * 1e6, SMALL_PART: min(megabytes, 2.0) * 1e6}
    sizes = dict.fromkeys((*limits, ONE_LINE), 0)
    files = {name: (folder / name).open("w", encoding="utf-8") for name in sizes}
    for text in _texts(source, json_key):
        unfilled = [name for name, limit in limits.items() if sizes[name] < limit]
        if CORPUS not in unfilled:
            break
        for name in [*unfilled, *([] if sizes[ONE_LINE] else [ONE_LINE])]:
            files[name].write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
            sizes[name] += len(text.encode())
    for file in files.values():
        file.close()
    if not sizes[CORPUS]:
        raise DataError(f"{source}: holds no text; give a file of JSON lines with text under --json-key")
    return {f"{Path(name).stem}_bytes": size for name, size in sizes.items()}


def _texts(source: Path | None, json_key: str) -> Iterator[str]:
    """Texts that are not blank; those of the sample corpus repeat without end."""
    import orjson
    import pyarrow as pa

    path = source or _SAMPLE
    while True:
        try:
            with pa.input_stream(path) as unpacked, io.BufferedReader(unpacked) as file:
                for number, line in enumerate(file, 1):
                    text = orjson.loads(line)[json_key] if line.strip() else ""
                    if not isinstance(text, str):
                        raise DataError(f"{path}:{number}: {json_key!r} is no text; see --json-key")
                    if text.strip():
                        yield text
        except (OSError, orjson.JSONDecodeError, KeyError, TypeError) as error:
            raise DataError(f"{path}: cannot be used as JSON lines with text under {json_key!r}: {error}") from None
        if source is not None:
            return


def _learn_vocabulary(folder: Path) -> Path:
    """A WordPiece vocabulary of the part that the peers get; not measured."""
    from pretrain.bench.data_contenders import PART

    vocab, part = folder / "vocab.txt", folder / PART
    size = 20_000 if part.stat().st_size > 4e6 else 1_000
    command = [sys.executable, "-m", "pretrain.cli", "data", "train-tokenizer", "--input", str(part)]
    command += ["--output", str(vocab), "--vocab-size", str(size)]
    answer = subprocess.run(command, capture_output=True, text=True, check=False)
    if answer.returncode:
        raise TacoError(f"bench: no vocabulary could be learnt; give --tokenizer: {answer.stderr.strip()[-500:]}")
    return vocab


def summarise(setting: dict[str, Any], runs: Runs) -> dict[str, Any]:
    """The report: megabytes (10^6) of text per CPU second of work, without start-up, and ours over every peer's."""
    seconds, start = medians(runs, "seconds"), medians(runs, "start_seconds")
    speed = {name: answers[0]["text_bytes"] / 1e6 / seconds[name] for name, answers in runs.items()}
    return {
        "benchmark": "data",
        "setting": setting,
        "machine": machine(),
        "versions": {name: version for answers in runs.values() for name, version in answers[0]["versions"].items()},
        "megabytes_per_cpu_second": speed,
        "spread": {
            name: spread([run["text_bytes"] / 1e6 / run["seconds"] for run in answers]).as_dict()
            for name, answers in runs.items()
        },
        "start_cpu_seconds": {name: value for name, value in start.items() if name not in LIMITS},
        "peak_bytes": {name: max(run["peak_bytes"] for run in answers) for name, answers in runs.items()},
        "is_equal": {
            name: all(run["is_equal"] for run in answers) for name, answers in runs.items() if _is_compared(answers)
        },
        "ratios": {f"taco_over_{name}": speed["taco"] / value for name, value in speed.items() if name != "taco"},
        "runs": runs,
    }


def _is_compared(answers: list[dict[str, Any]]) -> bool:
    return answers[0]["is_equal"] is not None


def table(report: dict[str, Any]) -> str:
    """The report for people."""
    lines = [f"{'':16} {'MB per CPU s':>13} {'quartiles':>17} {'start, CPU s':>13} {'taco / it':>10}"]
    for name, speed in report["megabytes_per_cpu_second"].items():
        start = report["start_cpu_seconds"].get(name)
        ratio = report["ratios"].get(f"taco_over_{name}")
        columns = f"{'' if start is None else f'{start:.2f}':>13} {'' if ratio is None else f'{ratio:.2f}':>10}"
        quartiles = show_quartiles(report["spread"][name], 2)
        lines.append(f"{name:16} {speed:13,.2f} {quartiles:>17} {columns}")
    wrong = [name for name, is_equal in report["is_equal"].items() if not is_equal]
    lines.append(f"ids that differ from those of taco data preprocess: {', '.join(wrong) or 'none'}")
    return "\n".join(lines)


if __name__ == "__main__":
    run_program(app, name="python -m pretrain.bench.data")
