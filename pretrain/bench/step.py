"""`taco bench step`: one optimizer step of ours against Hugging Face's BERT with the authors' loss, in one run.

Contenders run in separate processes, to measure each one's peak memory, and interleaved, so that a noisy machine is
noisy for all of them; figures are medians, and only their ratios count:

    taco   this project's engine, both losses
    mlm    this project's engine, contrastive weight 0
    peer   transformers' BertForMaskedLM, logits of every position, and the authors' loss over a [B, L, K, D] tensor,
           computed out of place (their in-place version cannot train in fp32); its pairs are drawn beforehand, untimed

On a GPU in 16 bits the peer runs under torch.autocast with fp32 weights, like transformers' Trainer.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from pretrain.bench.contest import Runs, machine, peak_bytes, publish, run_contest, versions
from pretrain.cli import new_program, run_program
from pretrain.errors import ConfigError

if TYPE_CHECKING:
    import torch

    from pretrain.config.sections import RunConfig
    from pretrain.data.batches import Batch

app = new_program()

Device = Literal["cpu", "cuda"]
Precision = Literal["fp32", "bf16"]
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
    steps: Annotated[int, typer.Option(min=1, help="timed steps per process, after a warm-up")] = 3,
    rounds: Annotated[int, typer.Option(min=1, help="processes per contender")] = 2,
    device: Annotated[Device, typer.Option(help="where the contenders compute")] = "cpu",
    precision: Annotated[Precision, typer.Option(help="precision of matrix products")] = "fp32",
    zero_stage: Annotated[int, typer.Option(min=0, max=3, help="ours: ZeRO stage")] = 1,
    recompute_layers: Annotated[int, typer.Option(min=0, help="ours: encoder layers that are recomputed")] = 0,
    offload: Annotated[bool, typer.Option("--offload", help="ours: optimizer state in CPU memory")] = False,
    compiled: Annotated[bool, typer.Option("--compile", help="ours: torch.compile each encoder layer")] = False,
    only: Annotated[list[str] | None, typer.Option(help="taco, mlm or peer; default: all")] = None,
    out: Annotated[Path | None, typer.Option(help="also write the JSON here")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="machine-readable output")] = False,
    contender: Annotated[str | None, typer.Option(hidden=True, help="measure this one in this process")] = None,
) -> None:
    """Measure time and peak memory of a training step against Hugging Face with the authors' loss."""
    shape = {
        "rows": rows,
        "seq_length": seq_length,
        "num_layers": num_layers,
        "hidden_size": hidden_size,
        "num_negatives": num_negatives,
        "dropout": dropout,
        "device": device,
        "precision": precision,
        "zero_stage": zero_stage,
        "recompute_layers": recompute_layers,
        "offload": offload,
        "compile": compiled,
    }
    if contender is not None:
        typer.echo(json.dumps(_measure(contender, shape, threads, steps)))
        return
    arguments = [f"--threads={threads}", f"--steps={steps}", *_as_options(shape)]
    report = _summarise(shape, threads, run_contest("pretrain.bench.step", _chosen(only), arguments, rounds))
    publish(report, _table(report), out, as_json=as_json)


def _chosen(only: list[str] | None) -> tuple[str, ...]:
    unknown = [name for name in only or () if name not in CONTENDERS]
    if unknown:
        raise ConfigError(f"--only {unknown[0]}: there is no such contender; choose from {', '.join(CONTENDERS)}")
    return tuple(name for name in CONTENDERS if not only or name in only)


def _as_options(shape: dict[str, Any]) -> list[str]:
    """The command-line options for `shape`."""
    options = []
    for key, value in shape.items():
        name = f"--{key.replace('_', '-')}"
        if not isinstance(value, bool):
            options.append(f"{name}={value}")
        elif value:
            options.append(name)
    return options


def _summarise(shape: dict[str, Any], threads: int, runs: Runs) -> dict[str, Any]:
    seconds = {name: median(s for run in answers for s in run["seconds"]) for name, answers in runs.items()}
    memory = {name: max(run["peak_bytes"] for run in answers) for name, answers in runs.items()}
    first = next(iter(runs.values()))[0]
    return {
        "benchmark": "step",
        "shape": shape,
        "threads": threads,
        "machine": {**machine(), "device": first["device_name"]},
        "versions": first["versions"],
        "seconds": seconds,
        "peak_bytes": memory,
        "tokens_per_second": {name: shape["rows"] * shape["seq_length"] / s for name, s in seconds.items()},
        "model_tflops": {name: first["model_flops"] / s / 1e12 for name, s in seconds.items()},
        "ratios": _ratios(seconds, memory),
        "runs": runs,
    }


def _ratios(seconds: dict[str, float], memory: dict[str, int]) -> dict[str, float]:
    """Ratios of ours to each other contender that took part."""
    figures: dict[str, Mapping[str, float]] = {"time": seconds, "memory": memory}
    pairs = (("time", "peer"), ("memory", "peer"), ("time", "mlm"))
    return {
        f"{figure}_taco_over_{other}": figures[figure]["taco"] / figures[figure][other]
        for figure, other in pairs
        if {"taco", other} <= seconds.keys()
    }


def _table(report: dict[str, Any]) -> str:
    lines = [f"{'':6} {'seconds':>9} {'peak memory':>12} {'tokens/s':>10} {'model TFLOP/s':>14}"]
    for name, seconds in report["seconds"].items():
        memory, rate = report["peak_bytes"][name] / 1e9, report["tokens_per_second"][name]
        lines.append(f"{name:6} {seconds:9.4f} {memory:9.2f} GB {rate:10,.0f} {report['model_tflops'][name]:14.1f}")
    for key, text in (
        ("time_taco_over_peer", "taco / peer: {:.3f} of the time"),
        ("memory_taco_over_peer", "taco / peer: {:.3f} of the peak memory"),
        ("time_taco_over_mlm", "taco / mlm:  {:.3f} of the time (the price of the contrastive loss)"),
    ):
        if key in report["ratios"]:
            lines.append(text.format(report["ratios"][key]))
    return "\n".join(lines)


# -- one contender, in its own process ---------------------------------------------------------------------------------


def _measure(contender: str, shape: dict[str, Any], threads: int, steps: int) -> dict[str, Any]:
    import torch

    torch.set_num_threads(threads)
    config = _config(shape, is_contrastive=contender != "mlm")
    device = _start(config)
    run_step = _peer(config, device) if contender == "peer" else _ours(config, device)
    # The first steps set up the allocator, optimizer state, thread pools and kernels; a GPU also settles its clock.
    for number in range(1 if device.type == "cpu" else 3):
        run_step(number)
    seconds = [_time(run_step, number, device) for number in range(3, steps + 3)]
    return {
        "seconds": seconds,
        "peak_bytes": peak_bytes() if device.type == "cpu" else torch.cuda.max_memory_allocated(device),
        "device_name": "cpu" if device.type == "cpu" else torch.cuda.get_device_name(device),
        "model_flops": model_flops(config),
        "versions": versions("torch", "deepspeed", "transformers"),
    }


def _start(config: RunConfig) -> torch.device:
    """The device of every contender; tells DeepSpeed which one to use before it is imported."""
    import os

    from pretrain.parallel.launch import Launch, choose_device, start_process_group

    launch = Launch(0, 1, 0, 1)
    device = choose_device(config.run.device, launch)
    os.environ["DS_ACCELERATOR"] = device.type
    start_process_group(launch, device)
    return device


def _time(run_step: Callable[[int], None], number: int, device: torch.device) -> float:
    """Seconds of one step, with the work that it queued on the GPU."""
    import torch

    start = time.perf_counter()
    run_step(number)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def model_flops(config: RunConfig) -> float:
    """Multiplications and additions of the products of one micro-batch, forward and backward, without recomputation.

    Counted as Megatron-LM does (Narayanan et al. 2021, appendix): attention sees whole rows. The vocabulary head works
    on the masked tokens alone, and the contrastive loss counts nothing.
    """
    model, rows, length = config.model, config.train.micro_batch_size, config.data.seq_length
    size, inner = model.hidden_size, model.ffn_hidden_size
    per_token = model.num_layers * (8 * size**2 + 4 * size * inner + 4 * length * size)
    per_masked = 2 * size**2 + 2 * size * VOCAB_SIZE
    return 3.0 * rows * length * (per_token + config.objective.mask_rate * per_masked)


def _config(shape: dict[str, Any], *, is_contrastive: bool) -> RunConfig:
    from pretrain.config.sections import RunConfig

    return RunConfig.model_validate(
        {
            "run": {"output_dir": "unused", "device": shape["device"]},
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
            "train": {
                "micro_batch_size": shape["rows"],
                "global_batch_size": shape["rows"],
                "recompute_layers": shape["recompute_layers"],
                "compile": shape["compile"],
            },
            "zero": {
                "stage": shape["zero_stage"],
                "offload_optimizer": {"device": "cpu" if shape["offload"] else "none"},
            },
            "precision": shape["precision"],
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


def _ours(config: RunConfig, device: torch.device) -> Callable[[int], None]:
    from pretrain.engine.plain import PlainEngine
    from pretrain.model.build import build_model
    from pretrain.parallel.mesh import Mesh

    mesh = Mesh(dp_rank=0, dp_size=1)
    engine = PlainEngine(config, build_model(config, VOCAB_SIZE, mesh, device), device, mesh)

    def run_step(number: int) -> None:
        engine.train_step([_random_batch(config, number)], learning_rate=config.optim.lr)

    return run_step


def _peer(config: RunConfig, device: torch.device) -> Callable[[int], None]:
    import torch
    from transformers import BertConfig, BertForMaskedLM

    from pretrain.model.hf import hf_config
    from pretrain.objectives.taco import sample_pairs

    torch.manual_seed(1)
    model = BertForMaskedLM(BertConfig(**hf_config(config.model, VOCAB_SIZE))).train().to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.optim.lr, weight_decay=0.01, fused=True)
    objective = config.objective
    valid_BL = torch.ones(config.train.micro_batch_size, config.data.seq_length, dtype=torch.bool, device=device)
    positive_BL, negative_BLK = sample_pairs(
        valid_BL,
        window=objective.positive_window,
        num_negatives=objective.num_negatives,
        seed=1,
        micro_batch_index=0,
    )
    in_16_bits = torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bf16")

    def run_step(number: int) -> None:
        batch = _random_batch(config, number)
        labels_BL = torch.full(valid_BL.shape, -100)
        labels_BL.view(-1)[torch.from_numpy(batch.masked_index_M)] = torch.from_numpy(batch.masked_label_M)
        ids_BL = torch.from_numpy(batch.input_ids_BL).to(device)
        with in_16_bits:
            outputs = model(input_ids=ids_BL, labels=labels_BL.to(device), output_hidden_states=True)
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
    row_B1 = torch.arange(len(semantics_BLD), device=semantics_BLD.device)[:, None]
    positives_BL1D = semantics_BLD[row_B1, positive_BL].unsqueeze(2)
    negatives_BLKD = semantics_BLD.flatten(0, 1)[negative_BLK]
    candidates = torch.cat([positives_BL1D, negatives_BLKD], dim=2).detach()
    logits = functional.cosine_similarity(semantics_BLD.unsqueeze(2), candidates, dim=-1) / temperature
    nearest = torch.zeros(positive_BL.numel(), dtype=torch.int64, device=logits.device)
    return functional.cross_entropy(logits.flatten(0, 1), nearest)


if __name__ == "__main__":
    run_program(app, name="python -m pretrain.bench.step")
