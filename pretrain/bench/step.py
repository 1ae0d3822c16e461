"""`taco bench step`: one optimizer step of ours against Hugging Face's BERT with the authors' loss, in one run.

Contenders, each in a process of its own so that peak memory is its own, interleaved so that a noisy machine is noisy
for all of them; figures are medians, and what counts is their ratio:

    taco   this project's engine, both losses
    mlm    this project's engine, contrastive weight 0
    peer   transformers' BertForMaskedLM, logits of every position, and the authors' loss over a [B, L, K, D] tensor,
           computed out of place (their in-place version cannot train in fp32); its pairs are drawn beforehand, for free
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pretrain.bench.contest import Runs, machine, peak_bytes, publish, run_contest, versions
from pretrain.cli import new_program, run_program

if TYPE_CHECKING:
    import torch

    from pretrain.config import RunConfig
    from pretrain.data.batches import Batch

app = new_program()

CONTENDERS = ("taco", "mlm", "peer")
VOCAB_SIZE = 30_522
SPECIAL_IDS = 1000  # bert-base-uncased keeps its special and unused entries below


@app.command(epilog="Example: taco bench step --threads 2 --json")
def step(
    rows: Annotated[int, typer.Option(min=2, help="micro-batch size")] = 16,
    seq_length: Annotated[int, typer.Option(min=8, help="tokens per row")] = 256,
    num_layers: Annotated[int, typer.Option(min=1)] = 4,
    hidden_size: Annotated[int, typer.Option(min=64, help="64 features per head, feed-forward 4 times as wide")] = 512,
    num_negatives: Annotated[int, typer.Option(min=1)] = 50,
    dropout: Annotated[float, typer.Option(min=0.0, max=0.9, help="hidden and attention dropout")] = 0.1,
    threads: Annotated[int, typer.Option(min=1, help="torch threads of every contender")] = 2,
    steps: Annotated[int, typer.Option(min=1, help="timed steps per process, after one that is not timed")] = 3,
    rounds: Annotated[int, typer.Option(min=1, help="processes per contender")] = 2,
    out: Annotated[Path | None, typer.Option(help="also write the JSON here")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="machine-readable output")] = False,
    contender: Annotated[str | None, typer.Option(hidden=True, help="measure this one in this process")] = None,
) -> None:
    """Time and peak memory of a training step (fp32, CPU) against Hugging Face with the authors' loss."""
    shape = {
        "rows": rows,
        "seq_length": seq_length,
        "num_layers": num_layers,
        "hidden_size": hidden_size,
        "num_negatives": num_negatives,
        "dropout": dropout,
    }
    if contender is not None:
        typer.echo(json.dumps(_measure(contender, shape, threads, steps)))
        return
    arguments = [f"--{key.replace('_', '-')}={value}" for key, value in shape.items()]
    arguments += [f"--threads={threads}", f"--steps={steps}"]
    report = _summarise(shape, threads, run_contest("pretrain.bench.step", CONTENDERS, arguments, rounds))
    publish(report, _table(report), out, as_json=as_json)


def _summarise(shape: dict[str, Any], threads: int, runs: Runs) -> dict[str, Any]:
    seconds = {name: median(s for run in found for s in run["seconds"]) for name, found in runs.items()}
    memory = {name: max(run["peak_bytes"] for run in found) for name, found in runs.items()}
    return {
        "benchmark": "step",
        "shape": shape,
        "threads": threads,
        "machine": machine(),
        "versions": runs["taco"][0]["versions"],
        "seconds": seconds,
        "peak_bytes": memory,
        "ratios": {
            "time_taco_over_peer": seconds["taco"] / seconds["peer"],
            "memory_taco_over_peer": memory["taco"] / memory["peer"],
            "time_taco_over_mlm": seconds["taco"] / seconds["mlm"],
        },
        "runs": runs,
    }


def _table(report: dict[str, Any]) -> str:
    lines = [f"{'':6} {'seconds':>9} {'peak memory':>12}"]
    for name in CONTENDERS:
        lines.append(f"{name:6} {report['seconds'][name]:9.3f} {report['peak_bytes'][name] / 1e9:9.2f} GB")
    ratios = report["ratios"]
    lines.append(f"taco / peer: {ratios['time_taco_over_peer']:.3f} of the time")
    lines.append(f"taco / peer: {ratios['memory_taco_over_peer']:.3f} of the peak memory")
    lines.append(f"taco / mlm:  {ratios['time_taco_over_mlm']:.3f} of the time (the price of the contrastive loss)")
    return "\n".join(lines)


# -- one contender, in its own process ---------------------------------------------------------------------------------


def _measure(contender: str, shape: dict[str, Any], threads: int, steps: int) -> dict[str, Any]:
    import torch

    torch.set_num_threads(threads)
    config = _config(shape, is_contrastive=contender != "mlm")
    run_step = _peer(config) if contender == "peer" else _ours(config)
    run_step(0)  # allocator, optimizer state and thread pools are made by the first step
    seconds = []
    for number in range(1, steps + 1):
        start = time.perf_counter()
        run_step(number)
        seconds.append(time.perf_counter() - start)
    return {"seconds": seconds, "peak_bytes": peak_bytes(), "versions": versions("torch", "deepspeed", "transformers")}


def _config(shape: dict[str, Any], *, is_contrastive: bool) -> RunConfig:
    from pretrain.config import RunConfig

    return RunConfig.model_validate(
        {
            "run": {"output_dir": "unused", "device": "cpu"},
            "data": {"train": ["unused"], "seq_length": shape["seq_length"]},
            "model": {
                "num_layers": shape["num_layers"],
                "hidden_size": shape["hidden_size"],
                "num_attention_heads": shape["hidden_size"] // 64,
                "ffn_hidden_size": 4 * shape["hidden_size"],
                "hidden_dropout": shape["dropout"],
                "attention_dropout": shape["dropout"],
                "max_position_embeddings": max(512, shape["seq_length"]),
            },
            "objective": {"num_negatives": shape["num_negatives"], "contrastive_weight": float(is_contrastive)},
            "train": {"micro_batch_size": shape["rows"], "global_batch_size": shape["rows"]},
        }
    )


def _random_batch(config: RunConfig, index: int) -> Batch:
    """A masked micro-batch of random words, the same for every contender."""
    import numpy as np

    from pretrain.data.batches import Batch

    generator = np.random.default_rng(index)
    rows, length = config.train.micro_batch_size, config.data.seq_length
    ids_BL = generator.integers(SPECIAL_IDS, VOCAB_SIZE, (rows, length))
    per_row = round(config.objective.mask_rate * (length - 2))
    columns = np.sort(generator.permuted(np.tile(np.arange(1, length - 1), (rows, 1)), axis=1)[:, :per_row], axis=1)
    index_M = (columns + np.arange(rows)[:, None] * length).ravel()
    label_M = ids_BL.ravel()[index_M].copy()
    ids_BL.ravel()[index_M] = 103  # [MASK]
    ones = np.ones((rows, length), np.int64)
    return Batch(ids_BL, ones, ones.astype(np.bool_), index_M, label_M, index)


def _ours(config: RunConfig) -> Callable[[int], None]:
    import torch

    from pretrain import parallel
    from pretrain.engine import PlainEngine
    from pretrain.model.layer_spec import plain_layers
    from pretrain.model.pretraining import BertForPretraining

    device = torch.device("cpu")
    parallel.start_process_group(parallel.Launch(0, 1, 0, 1), device)
    model = BertForPretraining(config.model, VOCAB_SIZE, plain_layers(), config.objective, seed=1, has_padding=False)
    engine = PlainEngine(config, model, device, parallel.Mesh(dp_rank=0, dp_size=1))

    def run_step(number: int) -> None:
        engine.train_step([_random_batch(config, number)], learning_rate=config.optim.lr)

    return run_step


def _peer(config: RunConfig) -> Callable[[int], None]:
    import torch
    from transformers import BertConfig, BertForMaskedLM

    from pretrain.model.hf import hf_config
    from pretrain.objectives.taco import sample_pairs

    torch.manual_seed(1)
    model = BertForMaskedLM(BertConfig(**hf_config(config.model, VOCAB_SIZE))).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.optim.lr, weight_decay=0.01, fused=True)
    objective = config.objective
    valid_BL = torch.ones(config.train.micro_batch_size, config.data.seq_length, dtype=torch.bool)
    positive_BL, negative_BLK = sample_pairs(
        valid_BL,
        window=objective.positive_window,
        num_negatives=objective.num_negatives,
        seed=1,
        micro_batch_index=0,
    )

    def run_step(number: int) -> None:
        batch = _random_batch(config, number)
        labels_BL = torch.full(valid_BL.shape, -100)
        labels_BL.view(-1)[torch.from_numpy(batch.masked_index_M)] = torch.from_numpy(batch.masked_label_M)
        ids_BL = torch.from_numpy(batch.input_ids_BL)
        outputs = model(input_ids=ids_BL, labels=labels_BL, output_hidden_states=True)
        loss = outputs.loss + authors_loss(
            outputs.hidden_states[-1], outputs.hidden_states[0], positive_BL, negative_BLK, objective.temperature
        )
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.optim.clip_grad_norm)
        optimizer.step()
        optimizer.zero_grad()

    return run_step


def authors_loss(
    hidden_BLD: torch.Tensor,
    embedding_BLD: torch.Tensor,
    positive_BL: torch.Tensor,
    negative_BLK: torch.Tensor,
    temperature: float,
) -> torch.Tensor:
    """The TACO loss as its authors compute it, every candidate of every token at once, but out of place; a scalar."""
    import torch
    from torch.nn import functional

    semantics_BLD = hidden_BLD - embedding_BLD
    row_B1 = torch.arange(len(semantics_BLD))[:, None]
    positives_BL1D = semantics_BLD[row_B1, positive_BL].unsqueeze(2)
    negatives_BLKD = semantics_BLD.flatten(0, 1)[negative_BLK]
    candidates = torch.cat([positives_BL1D, negatives_BLKD], dim=2).detach()
    logits = functional.cosine_similarity(semantics_BLD.unsqueeze(2), candidates, dim=-1) / temperature
    return functional.cross_entropy(logits.flatten(0, 1), torch.zeros(positive_BL.numel(), dtype=torch.int64))


if __name__ == "__main__":
    run_program(app, name="python -m pretrain.bench.step")
