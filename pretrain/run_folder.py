"""The folder of a run: who holds it, which configuration it belongs to, in which environment the run started.

config.yaml ds_config.json env.json run.json metrics.jsonl tokenizer/ checkpoints/ logs/ tensorboard/ report.html
heartbeats/ slurm/ done.json stop
"""

from __future__ import annotations

import fcntl
import json
import os
import platform
import shutil
import socket
import stat
import subprocess
import sys
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any, TextIO

import yaml
from pydantic import ValidationError

from pretrain import durable
from pretrain.config.load import dump_config, dump_tree
from pretrain.config.sections import MlmSection, RunConfig
from pretrain.errors import ConfigError, TacoError
from pretrain.runlog import get_logger

log = get_logger(__name__)

# Keys that may differ between two starts of one run without changing what is trained.
_FREE_KEYS = (
    "run.output_dir",
    "run.device",
    "run.tensorboard",
    "run.init_from",
    "data.prefetch",
    "data.index_cache",
    "train.log_every",
    "train.eval_every",
    "train.eval_batches",
    "train.max_bad_steps",
    "train.deterministic",
    "train.cuda_graphs",
    "train.recompute",
    "train.recompute_layers",
    "train.replica_check_every",
    "parallel",  # the layout is compared with the checkpoint's own
    "zero",
    "checkpoint",
    "watchdog",
    "deepspeed",
)
# What was done before a key existed, where its default is something else.
_BEFORE_THE_KEY: dict[str, Any] = {"mlm": {"average": "micro_batch"}}
_KEPT_VARIABLES = ("SLURM_", "NCCL_", "GLOO_", "OMP_", "CUDA_", "TORCH_", "DS_", "MASTER_", "WORLD_SIZE")


class RunFolder:
    """The folder of one run, locked by rank 0 of one process group at a time."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoints = path / "checkpoints"
        self.logs = path / "logs"
        self.heartbeats = path / "heartbeats"
        self.tokenizer = path / "tokenizer"
        self.stop_file = path / "stop"
        self._done = path / "done.json"
        self._lock: TextIO | None = None

    def claim(self) -> None:
        """Create the folder and lock it against a second run; called by rank 0.

        Raises:
            TacoError: another run holds it (host, process and job are named), or it cannot be written.
            ConfigError: it holds something other than a run.
        """
        try:
            self._refuse_strangers()
            durable.make_folders(self.path)
            self._lock = (self.path / "run.lock").open("a+", encoding="utf-8")
        except OSError as error:
            raise TacoError(f"run.output_dir {self.path}: cannot be used: {error}") from None
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._lock.seek(0)
            holder = self._lock.read().strip() or "an unknown process"
            raise TacoError(
                f"run.output_dir {self.path}: in use by {holder}; wait for it, stop it, or choose another folder"
            ) from None
        except OSError as error:
            raise TacoError(
                f"run.output_dir {self.path}: its file system cannot lock files ({error}); choose another one"
            ) from None
        if self.path.stat().st_mode & stat.S_IWOTH:
            log.warning("run.output_dir %s: everybody may write here, and so change the run; chmod -R o-w", self.path)
        self._write_holder(self._lock)

    def _write_holder(self, lock: TextIO) -> None:
        job = os.environ.get("SLURM_JOB_ID", "none")
        try:
            lock.truncate(0)
            lock.write(f"host {socket.gethostname()}, process {os.getpid()}, SLURM job {job}\n")
            lock.flush()
        except OSError as error:
            raise TacoError(f"run.output_dir {self.path}: cannot be written: {error}; free space there") from None

    def release(self) -> None:
        """Unlock the folder for the next run; the operating system does the same when the process dies."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def check_free(self, config: RunConfig, allowed: Iterable[str] = ()) -> None:
        """Check that a run with this configuration could claim the folder now; changes and locks nothing.

        A folder that an earlier process of the same SLURM job still holds counts as free: that process is about to end.

        Raises:
            ConfigError: another run holds it, or it holds something other than a run, or a run with another
                configuration.
        """
        self._refuse_strangers()
        holder = self._find_holder()
        job = os.environ.get("SLURM_JOB_ID")
        if holder is not None and not (job and holder.endswith(f"SLURM job {job}")):
            raise ConfigError(
                f"run.output_dir {self.path}: in use by {holder}; wait for it, stop it, or choose another folder"
            )
        self.check_config(config, allowed)

    def _find_holder(self) -> str | None:
        """Who holds the lock now; None if nobody does."""
        try:
            with (self.path / "run.lock").open(encoding="utf-8") as lock:
                try:
                    fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
                except BlockingIOError:
                    return lock.read().strip() or "an unknown process"
        except FileNotFoundError:
            return None
        except OSError as error:
            raise ConfigError(f"run.output_dir {self.path}: cannot be used: {error}") from None
        return None

    def clear_heartbeats(self) -> None:
        """Remove the heartbeats of an earlier start.

        Raises:
            TacoError: the folder cannot be written.
        """
        try:
            self.heartbeats.mkdir(exist_ok=True)
            for old in self.heartbeats.iterdir():
                old.unlink(missing_ok=True)
        except OSError as error:
            raise TacoError(f"{self.heartbeats}: cannot be cleared: {error}; free space or remove it") from None

    def mark_done(self, step: int) -> None:
        """Record durably that the run has done its last step; readers compare `step` with train.steps."""
        now = datetime.now(UTC).isoformat(timespec="seconds")
        durable.write_text(self._done, json.dumps({"step": step, "time": now}) + "\n")

    def clear_done(self) -> None:
        """Remove the mark: train.steps was raised, and the run continues."""
        self._done.unlink(missing_ok=True)

    def check_config(self, config: RunConfig, allowed: Iterable[str] = ()) -> list[str]:
        """Differences from the configuration that this folder's run was started with, as `key: old -> new`.

        Raises:
            ConfigError: a key that changes what is trained differs and is not in `allowed`.
            TacoError: the configuration of the run cannot be read.
        """
        old = self._read_config()
        if old is None:
            return []
        changes = compare(old, dump_tree(self.keep_average(config)))
        refused = _refused(changes, allowed)
        if refused:
            listing = "\n".join(f"  - {text}" for text in refused)
            raise ConfigError(
                f"run.output_dir {self.path}: belongs to a run with another configuration\n{listing}\n"
                "choose another run.output_dir, undo the changes, or add --allow-change KEY for each of them"
            )
        return list(changes.values())

    def keep_average(self, config: RunConfig) -> RunConfig:
        """`config` with the `mlm.average` of this folder's run, unless `config` was given one.

        A run that an older version began has no such key, and must not change its objective when it is continued.

        Raises:
            ConfigError: the folder's configuration cannot be read.
        """
        old = self._read_config()
        if old is None or "average" in config.mlm.model_fields_set:
            return config
        try:
            return config.model_copy(update={"mlm": MlmSection.model_validate(old["mlm"])})
        except ValidationError:  # not written by this program: the comparison of all keys says what is wrong
            return config

    def _read_config(self) -> dict[str, Any] | None:
        """The configuration that this folder's run was started with, later keys included; None if there is none."""
        path = self.path / "config.yaml"
        try:
            old = yaml.safe_load(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except OSError as error:
            raise TacoError(f"{path}: cannot be read: {error.strerror or error}") from None
        except (ValueError, RecursionError, yaml.YAMLError) as error:
            reason = " ".join(str(error).split())
            raise ConfigError(
                f"{path}: is no configuration of a run ({reason}); copy that of a checkpoint over it"
            ) from None
        if not isinstance(old, dict):
            raise ConfigError(f"{path}: is no configuration of a run; copy that of a checkpoint over it")
        return _with_later_keys(old)

    def write_description(self, config: RunConfig, ds_config: dict[str, Any], environment: dict[str, Any]) -> None:
        """Save the resolved configuration, DeepSpeed's, and the environment with the run."""
        durable.write_text(self.path / "config.yaml", dump_config(config))
        durable.write_text(self.path / "ds_config.json", json.dumps(ds_config, indent=1) + "\n")
        durable.write_text(self.path / "env.json", json.dumps(environment, indent=1) + "\n")

    def keep_tokenizer(self, files: Mapping[str, bytes]) -> bool:
        """Keep the files of the data's tokenizer in the run; whether other ones were there, which they replace.

        Raises:
            TacoError: the old ones cannot be read.
            OSError: the folder cannot be written.
        """
        old = _content_of(self.tokenizer)
        if old == files:
            return False
        temporary = self.path / ".tokenizer.tmp"
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        for name, content in files.items():
            (temporary / name).write_bytes(content)
            durable.sync_file(temporary / name)
        durable.sync_folder(temporary)
        if old is not None:
            replaced = self.path / ".tokenizer.old"
            shutil.rmtree(replaced, ignore_errors=True)
            self.tokenizer.rename(replaced)
        temporary.rename(self.tokenizer)
        durable.sync_folder(self.path)
        if old is not None:
            shutil.rmtree(replaced, ignore_errors=True)
        return old is not None

    def _refuse_strangers(self) -> None:
        try:
            names = {entry.name for entry in self.path.iterdir()}
        except FileNotFoundError:
            return
        except NotADirectoryError:
            raise ConfigError(f"run.output_dir {self.path}: is a file; name a folder") from None
        except OSError as error:
            raise TacoError(f"run.output_dir {self.path}: cannot be read: {error.strerror or error}") from None
        if names and not names & {"config.yaml", "run.lock", "slurm"}:
            some = ", ".join(sorted(names)[:3])
            raise ConfigError(
                f"run.output_dir {self.path}: holds {some} ... and no run; choose an empty or a new folder"
            )


def refused_changes(old: dict[str, Any], config: RunConfig, allowed: Iterable[str] = ()) -> list[str]:
    """Keys that change what is trained and differ from an older configuration, as `key: old -> new`."""
    return _refused(compare(_with_later_keys(old), dump_tree(config)), allowed)


def _refused(changes: dict[str, str], allowed: Iterable[str]) -> list[str]:
    free = (*_FREE_KEYS, *allowed)
    return [text for key, text in changes.items() if not any(_is_part_of(key, name) for name in free)]


def _with_later_keys(old: dict[str, Any]) -> dict[str, Any]:
    """An older version's tree, with keys added since; with few of them if it is no longer valid."""
    tree = _BEFORE_THE_KEY | old
    try:
        return RunConfig.model_validate(tree).model_dump(mode="json")
    except ValidationError:
        return tree


def _content_of(folder: Path) -> dict[str, bytes] | None:
    """The files of a folder by name; None if there is no such folder. Raises TacoError: they cannot be read."""
    try:
        return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    except FileNotFoundError:
        return None
    except OSError as error:
        raise TacoError(f"{error.filename or folder}: cannot be read: {error.strerror or error}") from None


def _is_part_of(key: str, name: str) -> bool:
    """Whether `key` is `name` itself or, if `name` is a section, a key in it."""
    return key == name or key.startswith(f"{name}.")


def compare(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> dict[str, str]:
    """Leaves that differ between two configuration trees: key -> `key: old -> new`."""
    changes: dict[str, str] = {}
    for key in sorted(old.keys() | new.keys()):
        before, after, name = old.get(key), new.get(key), f"{prefix}{key}"
        if isinstance(before, dict) and isinstance(after, dict):
            changes |= compare(before, after, f"{name}.")
        elif before != after:
            changes[name] = f"{name}: {_as_written(before)} -> {_as_written(after)}"
    return changes


def _as_written(value: Any) -> str:
    """A value as a configuration spells it."""
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else repr(value)


def describe_environment(world_size: int, device: str) -> dict[str, Any]:
    """Versions, machine, command and launcher's environment variables of this process, as plain JSON types."""
    packages = ("torch", "deepspeed", "megatron-core", "transformers", "tokenizers", "numpy", "taco-pretrain")
    return {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": sys.argv,
        "host": socket.gethostname(),
        "device": device,
        "world_size": world_size,
        "cpu_count": os.cpu_count(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in packages},
        "revision": revision(),
        "variables": {key: value for key, value in sorted(os.environ.items()) if key.startswith(_KEPT_VARIABLES)},
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def revision() -> str | None:
    """The git revision of this project, marked if there are uncommitted changes; None if this is no clone of it.

    The package may lie inside somebody else's repository: in a virtual environment there, or copied into it.
    """
    code = Path(__file__).resolve()
    root = code.parents[1]
    top = _ask_git(root, "rev-parse", "--show-toplevel")
    if top is None or Path(top).resolve() != root or not (root / "pyproject.toml").is_file():
        return None
    if not _ask_git(code.parent, "ls-files", "--", code.name):
        return None
    return _ask_git(code.parent, "describe", "--always", "--dirty", "--abbrev=12")


def _ask_git(folder: Path, *words: str) -> str | None:
    """The output of git in `folder`; None if it is empty, or git fails or is not installed."""
    command = ["git", "-C", str(folder), *words]
    # These, which git sets in its hooks, would name the user's repository.
    named = ("GIT_DIR", "GIT_WORK_TREE", "GIT_COMMON_DIR", "GIT_INDEX_FILE", "GIT_PREFIX")
    variables = {key: value for key, value in os.environ.items() if key not in named}
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True, env=variables)
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.stdout.strip() or None
