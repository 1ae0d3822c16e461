"""Starting a run from other weights (`run.init_from`): what must agree is compared by key before a tensor is read.

Shapes alone do not show that weights fit. Other heads, another epsilon or another vocabulary of the same size give a
model that loads, and computes something else.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

from pretrain.checkpoint.manifest import CheckpointManifest, find_checkpoint
from pretrain.checkpoint.store import verify_together
from pretrain.checkpoint.weights import load_weights_into
from pretrain.config.sections import ModelSection, RunConfig
from pretrain.data.tokenizer.info import TokenizerInfo
from pretrain.data.tokenizer.load import load_dataset_tokenizer
from pretrain.data.tokenizer.same_ids import find_difference
from pretrain.errors import CheckpointError, ConfigError, TacoError
from pretrain.hf_reading.tokenizer import load_folder_tokenizer
from pretrain.parallel import collectives
from pretrain.runlog import get_logger

if TYPE_CHECKING:
    import torch

    from pretrain.model.bert import Bert
    from pretrain.model.pipeline import BertPipeline
    from pretrain.parallel.mesh import Mesh

log = get_logger(__name__)

T = TypeVar("T")

# Keys of the model section that say how weights were trained or drawn, and not what is computed with them.
_FREE_KEYS = ("hidden_dropout", "attention_dropout", "initializer_range")
# Keys that no shape shows: another value computes something else with the same weights.
_HIDDEN_KEYS = ("num_attention_heads", "layer_norm_eps")


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
    folder = _ask_rank_0(lambda: find_start(path))
    try:
        verify_together(folder)
    except CheckpointError as error:
        raise CheckpointError(f"run.init_from {path}: {error}; name another step-NNNNNNN folder") from None
    notes = _ask_rank_0(lambda: check_start(folder, config, tokenizer, allowed))
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


def find_start(path: Path) -> Path:
    """The checkpoint folder that `run.init_from` names: itself, or the newest in a run's folder.

    Raises:
        ConfigError: there is none; says what is there instead.
    """
    name = f"run.init_from {path}"
    if not path.exists():
        raise ConfigError(f"{name}: is not there; give a checkpoint, a run's folder or what `taco import-hf` wrote")
    if path.is_file():
        raise ConfigError(f"{name}: is a file; give the folder of a checkpoint (`taco import-hf` makes one)")
    try:
        return find_checkpoint(path)
    except CheckpointError as error:
        if (path / "config.json").exists():
            raise ConfigError(
                f"{name}: is a Hugging Face folder; make a checkpoint of it with `taco import-hf {path} "
                f"imported/{path.resolve().name}` and name that"
            ) from None
        raise ConfigError(f"run.init_from {error}") from None


def check_start(folder: Path, config: RunConfig, tokenizer: TokenizerInfo, allowed: Sequence[str] = ()) -> list[str]:
    """Compare a checkpoint folder with a run that is to start from it; returns what a person should know.

    Raises:
        ConfigError: a key of the model section or the tokenizer differs; all of them are named.
        TacoError: the manifest or a tokenizer is damaged.
    """
    manifest = CheckpointManifest.load(folder)
    name = f"run.init_from {config.run.init_from}"
    different = compare_models(manifest.model, config.model)
    refused = {key: pair for key, pair in different.items() if key not in _HIDDEN_KEYS or not _is_allowed(key, allowed)}
    if refused:
        raise ConfigError(f"{name}: its weights belong to another model: {_explain_models(refused)}")
    notes = [
        f"model.{key} is {there!r} in the checkpoint and {here!r} in this run, as allowed"
        for key, (there, here) in different.items()
    ]
    problem, note = _compare_tokenizers(folder, manifest, config, tokenizer, may_differ="data.train" in allowed)
    if problem is not None:
        raise ConfigError(f"{name}: {problem}")
    return [*notes, *([note] if note else [])]


def compare_models(saved: dict[str, Any], model: ModelSection) -> dict[str, tuple[Any, Any]]:
    """Keys of the model section in which a checkpoint differs from a run, with both values; how it trained is free.

    Keys that the checkpoint does not know have the default, those that this program does not know None.
    """
    there = {name: field.default for name, field in ModelSection.model_fields.items()} | saved
    here = model.model_dump(mode="json")
    return {key: (there[key], here.get(key)) for key in there if key not in _FREE_KEYS and there[key] != here.get(key)}


def _explain_models(different: dict[str, tuple[Any, Any]]) -> str:
    values = ", ".join(f"model.{key} is {there!r} there and {here!r} here" for key, (there, here) in different.items())
    unknown = [key for key, (_, here) in different.items() if key not in ModelSection.model_fields]
    if unknown:
        return f"{values}; this program does not know {', '.join(unknown)}: use the release that wrote the checkpoint"
    settings = " ".join(f"model.{key}={there}" for key, (there, _) in different.items())
    hidden = " ".join(f"--allow-change model.{key}" for key in different if key in _HIDDEN_KEYS)
    return f"{values}; set {settings}" + (f" (to compute something else on purpose: {hidden})" if hidden else "")


def _compare_tokenizers(
    folder: Path, manifest: CheckpointManifest, config: RunConfig, ours: TokenizerInfo, *, may_differ: bool
) -> tuple[str | None, str | None]:
    """A problem that ends the run, and a note for a person."""
    data = f"data.train was made with {_describe(ours)}"
    has_files = any(
        record.name.startswith("tokenizer/") for record in manifest.files
    )  # what it does not name is ignored
    theirs = load_folder_tokenizer(folder / "tokenizer") if has_files else None
    if theirs is None:
        return _compare_without_files(folder, manifest, ours, data)
    if theirs.vocab_size != manifest.vocab_size:
        return (
            f"has {manifest.vocab_size:,} word embeddings for the {theirs.vocab_size:,} pieces of its tokenizer; "
            "import its Hugging Face folder again with `taco import-hf`, which leaves out padding rows",
            None,
        )
    difference = find_difference(theirs, load_dataset_tokenizer(config.data.train[0], ours))
    if difference is None:
        return None, None
    text = f"was trained with {_describe(theirs.info)}, {data}: {difference}"
    if theirs.vocab_size != ours.vocab_size:
        return f"{text}; preprocess the data with --tokenizer {folder / 'tokenizer'}", None
    if may_differ:
        return None, f"{text}, as allowed"
    return (
        f"{text}; preprocess the data with --tokenizer {folder / 'tokenizer'} (if the pieces that differ were "
        "replaced on purpose: --allow-change data.train)",
        None,
    )


def _compare_without_files(
    folder: Path, manifest: CheckpointManifest, ours: TokenizerInfo, data: str
) -> tuple[str | None, str | None]:
    again = "import its Hugging Face folder again with --tokenizer FILE, the tokenizer that the model was trained with"
    if manifest.vocab_size != ours.vocab_size:
        return f"has {manifest.vocab_size:,} word embeddings and no tokenizer, {data}; {again}", None
    if manifest.tokenizer_sha256 in ("", ours.sha256):
        unknown = f"holds no tokenizer, so nothing shows that its ids mean the same words: {data}; {again}, to be sure"
        return None, None if manifest.tokenizer_sha256 else unknown
    return (
        f"was trained with another tokenizer (sha256 {manifest.tokenizer_sha256[:12]}), which {folder} does not hold, "
        f"{data}; {again}",
        None,
    )


def _describe(info: TokenizerInfo) -> str:
    return f"tokenizer {info.name} (sha256 {info.sha256[:12]}, {info.vocab_size:,} pieces)"


def _is_allowed(key: str, allowed: Sequence[str]) -> bool:
    return "model" in allowed or f"model.{key}" in allowed


def _ask_rank_0(question: Callable[[], T]) -> T:
    """Rank 0's answer on every rank, or its error: the others may see another state of a shared folder."""
    answer: T | None = None
    problem: tuple[int, str] | None = None
    if collectives.rank() == 0:
        try:
            answer = question()
        except TacoError as error:
            problem = (error.exit_code, str(error))
    answer, problem = collectives.gather_objects((answer, problem))[0]
    if problem is not None:
        code, message = problem
        raise (ConfigError if code == ConfigError.exit_code else CheckpointError)(message)
    return cast(T, answer)
