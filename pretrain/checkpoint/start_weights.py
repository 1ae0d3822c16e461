"""Starting a run from other weights (`run.init_from`): they are verified, compared with the run, and read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from pretrain.checkpoint.manifest import CheckpointManifest
from pretrain.checkpoint.start_check import check_start, find_start
from pretrain.checkpoint.store import verify_together
from pretrain.checkpoint.weights import load_weights_into
from pretrain.config.sections import RunConfig
from pretrain.data.tokenizer.info import TokenizerInfo
from pretrain.errors import CheckpointError
from pretrain.parallel.collectives import ask_rank_0
from pretrain.runlog import get_logger

if TYPE_CHECKING:
    import torch

    from pretrain.model.bert import Bert
    from pretrain.model.pipeline import BertPipeline
    from pretrain.parallel.mesh import Mesh

log = get_logger(__name__)


def load_start(
    model: Bert | BertPipeline,
    config: RunConfig,
    tokenizer: TokenizerInfo,
    mesh: Mesh,
    device: torch.device,
    allowed: Sequence[str] = (),
) -> None:
    """Set the weights of `model` from `run.init_from`, if they belong to this configuration and tokenizer; collective.

    Args:
        tokenizer: of the run's data.
        allowed: keys that may differ although the weights then mean something else: of the model section where
            shapes stay the same, and `data.train` for another tokenizer of as many pieces.

    Raises:
        ConfigError: there is no checkpoint there, or a key or the tokenizer differs; with both values and the remedy.
        CheckpointError: it is damaged.
    """
    path = config.run.init_from
    assert path is not None  # the caller asks for it
    folder = ask_rank_0(lambda: find_start(path))
    try:
        verify_together(folder)
    except CheckpointError as error:
        raise CheckpointError(f"run.init_from {path}: {error}; name another step-NNNNNNN folder") from None
    notes = ask_rank_0(lambda: check_start(folder, config, tokenizer, allowed))
    num_tensors = load_weights_into(model, folder, mesh, device)
    manifest = CheckpointManifest.load(folder)
    log.info(
        "run.init_from %s: the run starts from the weights of %s (%s tensors, kind %s, step %s), with a new optimizer",
        path,
        folder,
        num_tensors,
        manifest.kind,
        f"{manifest.step:,}",
    )
    for note in notes:
        log.warning("run.init_from %s: %s", path, note)
