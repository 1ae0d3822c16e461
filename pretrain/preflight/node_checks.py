"""What one machine reports about itself before a run, and which of several machines stands out.

Imports no torch. Every machine makes a `NodeReport`: its GPUs, names, versions and the data files that it sees, and the
problems that it finds by itself. `find_failing` compares the reports: a machine that sees other data or has another
driver than most is as useless for a run as one with a broken GPU.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import socket
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path

import xxhash

from pretrain.config.sections import RunConfig
from pretrain.data.dataset.dataset_format import dataset_path

GPU_FIELDS = (
    "name",
    "driver_version",
    "memory.used",
    "ecc.errors.uncorrected.volatile.total",
    "retired_pages.pending",
    "remapped_rows.pending",
    "remapped_rows.failure",
)
# An idle GPU holds a few hundred MiB for its driver; a model left behind holds more.
MAX_IDLE_GPU_MIB = 1024
MIN_FREE_TEMPORARY = 1 << 30
MIN_FREE_SHARED_MEMORY = 512 << 20
_SAMPLE_BYTES = 1 << 20
_PIECE = 512  # characters per line of a report, besides the node's name
# fp32 weights and both AdamW moments, and a 16-bit copy with headers: what a checkpoint holds per parameter.
_CHECKPOINT_BYTES_PER_PARAMETER = 14


@dataclass(frozen=True)
class NodeReport:
    """One machine before a run; GPUs, versions, data and meeting point must be the same on all machines."""

    node: str
    host: str
    address: str | None = None
    meeting_point: str | None = None
    gpus: list[str] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=dict)
    data: dict[str, str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def to_lines(self) -> list[str]:
        """The report as text: `report NODE I/N PIECE`, one line for each of N pieces.

        srun mixes the output of its tasks, and keeps lines whole only if they are shorter than 1024 bytes.
        """
        text = json.dumps(asdict(self))
        pieces = [text[start : start + _PIECE] for start in range(0, len(text), _PIECE)]
        return [f"report {self.node} {number}/{len(pieces)} {piece}" for number, piece in enumerate(pieces)]

    @classmethod
    def from_lines(cls, lines: Iterable[str]) -> list[NodeReport]:
        """All complete reports among `lines`, in any order and mixed with anything else."""
        pieces_by_node: dict[str, dict[str, str]] = {}
        for line in lines:
            mark, _, rest = line.rstrip("\n").partition(" ")
            node, _, rest = rest.partition(" ")
            place, _, piece = rest.partition(" ")
            if mark == "report" and "/" in place:
                pieces_by_node.setdefault(node, {})[place] = piece
        return [report for pieces in pieces_by_node.values() if (report := cls._join(pieces)) is not None]

    @classmethod
    def _join(cls, pieces: Mapping[str, str]) -> NodeReport | None:
        """The report of all pieces `I/N`; None if one is missing or is not what was printed."""
        try:
            count = int(next(iter(pieces)).partition("/")[2])
            return cls(**json.loads("".join(pieces[f"{number}/{count}"] for number in range(count))))
        except (KeyError, TypeError, ValueError):
            return None


def inspect_machine(config: RunConfig, *, num_gpus: int, environment: Mapping[str, str] | None = None) -> NodeReport:
    """Check this machine; `num_gpus` processes need a GPU each (0: none does)."""
    variables = os.environ if environment is None else environment
    gpus, problems = inspect_gpus(num_gpus) if num_gpus else ([], [])
    address, meeting_point, name_problems = inspect_names(variables.get("MASTER_ADDR"))
    data, data_problems = fingerprint_data([*config.data.train, *config.data.validation])
    problems += name_problems + data_problems
    problems += find_disk_problems(config.run.output_dir, checkpoint_bytes(config) * (config.checkpoint.keep + 1))
    problems += find_temporary_problems(uses_gpus=num_gpus > 0)
    return NodeReport(
        node=variables.get("SLURMD_NODENAME") or socket.gethostname(),
        host=socket.gethostname(),
        address=address,
        meeting_point=meeting_point,
        gpus=gpus,
        versions=describe_versions(),
        data=data,
        problems=problems,
    )


# -- GPUs --------------------------------------------------------------------------------------------------------------


def inspect_gpus(expected: int) -> tuple[list[str], list[str]]:
    """Names and drivers of the GPUs that nvidia-smi shows here, and what is wrong with them."""
    command = ["nvidia-smi", f"--query-gpu={','.join(GPU_FIELDS)}", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    except FileNotFoundError:
        return [], [f"GPUs: {expected} asked for, but there is no nvidia-smi here; install the driver, or leave out"]
    except subprocess.TimeoutExpired:
        return [], ["GPUs: nvidia-smi does not answer within 60 s; reboot the machine"]
    if answer.returncode:
        output = " ".join((answer.stdout + answer.stderr).split())[:200]
        return [], [f"GPUs: nvidia-smi ends with code {answer.returncode}: {output}; reset the GPU or reboot"]
    return read_gpu_table(answer.stdout, expected)


def read_gpu_table(table: str, expected: int) -> tuple[list[str], list[str]]:
    """Names and problems from nvidia-smi's answer to `GPU_FIELDS`, a line per GPU; missing fields hold text."""
    rows = [[cell.strip() for cell in line.split(",")] for line in table.splitlines() if line.strip()]
    problems = []
    if len(rows) < expected:
        problems.append(f"GPUs: {expected} asked for, {len(rows)} there; one has fallen off the bus, or is not granted")
    for index, row in enumerate(rows):
        values = dict(zip(GPU_FIELDS, row, strict=False))
        if _number(values["memory.used"]) > MAX_IDLE_GPU_MIB:
            problems.append(
                f"GPU {index}: {values['memory.used']} MiB in use before the run; end the process that holds them"
            )
        if _number(values["ecc.errors.uncorrected.volatile.total"]) > 0:
            errors = values["ecc.errors.uncorrected.volatile.total"]
            problems.append(f"GPU {index}: {errors} uncorrected memory errors; reset it, replace it if they come back")
        for name in ("retired_pages.pending", "remapped_rows.pending", "remapped_rows.failure"):
            if values.get(name, "").lower() in ("yes", "1"):
                problems.append(f"GPU {index}: {name} is set: faulty memory; reset it, replace it if that stays")
    return [f"{row[0]}, driver {row[1]}" for row in rows[:expected]], problems


def _number(text: str) -> float:
    """The value of a cell; 0 if the GPU does not know it ("[N/A]")."""
    try:
        return float(text)
    except ValueError:
        return 0.0


# -- names, disks, data, versions --------------------------------------------------------------------------------------


def inspect_names(meeting_point: str | None) -> tuple[str | None, str | None, list[str]]:
    """This host's address and the meeting point's as this machine resolves them, and what is wrong with that."""
    problems, addresses = [], []
    for name in (socket.gethostname(), meeting_point):
        address = None
        if name:
            try:
                address = socket.gethostbyname(name)
            except OSError as error:
                problems.append(f"host name {name!r} has no address here ({error}); add it to DNS or /etc/hosts")
        addresses.append(address)
    return addresses[0], addresses[1], problems


def find_disk_problems(folder: Path, num_bytes: int) -> list[str]:
    """Whether `num_bytes` can be written where `folder` is or will be; leaves nothing behind."""
    place = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.is_dir())
    try:
        with tempfile.TemporaryFile(dir=place) as file:
            file.write(b"\0" * 4096)
            file.flush()
            os.fsync(file.fileno())
        free = shutil.disk_usage(place).free
    except OSError as error:
        return [f"run.output_dir {folder}: cannot be written here: {error}; mount it, or choose another folder"]
    if free < num_bytes:
        return [
            f"run.output_dir {folder}: {free / 1e9:.1f} GB free, about {num_bytes / 1e9:.1f} GB needed for "
            "checkpoint.keep + 1 checkpoints; free space, or lower checkpoint.keep"
        ]
    return []


def find_temporary_problems(*, uses_gpus: bool) -> list[str]:
    """Space for compilers' caches, and shared memory for NCCL, on this machine."""
    folder = Path(tempfile.gettempdir())
    problems = []
    if shutil.disk_usage(folder).free < MIN_FREE_TEMPORARY:
        problems.append(f"{folder}: less than {MIN_FREE_TEMPORARY >> 20} MiB free for caches; clean it, or set TMPDIR")
    shared = Path("/dev/shm")
    if uses_gpus and (not shared.is_dir() or shutil.disk_usage(shared).free < MIN_FREE_SHARED_MEMORY):
        problems.append(f"{shared}: less than {MIN_FREE_SHARED_MEMORY >> 20} MiB free for NCCL; clean it, enlarge it")
    return problems


def checkpoint_bytes(config: RunConfig) -> int:
    """Approximate bytes of one checkpoint, without the data at hand: a vocabulary of 32,768 is assumed."""
    model = config.model
    embeddings = (32768 + model.max_position_embeddings + model.type_vocab_size) * model.hidden_size
    layer = 4 * model.hidden_size**2 + 2 * model.hidden_size * model.ffn_hidden_size
    return _CHECKPOINT_BYTES_PER_PARAMETER * (embeddings + model.num_layers * layer)


def fingerprint_data(prefixes: Iterable[str]) -> tuple[dict[str, str], list[str]]:
    """Size and hash of each data file as this machine sees it, and those that are missing.

    The manifest is hashed whole, .bin and .idx by their first and last MiB: this must not take minutes, and `taco data
    verify` reads every byte.
    """
    fingerprints, problems = {}, []
    for prefix in prefixes:
        for suffix in (".bin", ".idx", ".json"):
            path = dataset_path(prefix, suffix)
            try:
                fingerprints[str(path)] = _fingerprint(path)
            except OSError as error:
                problems.append(f"{path}: cannot be read here: {error.strerror}; copy it, or mount its file system")
    return fingerprints, problems


def _fingerprint(path: Path) -> str:
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        digest.update(file.read(_SAMPLE_BYTES))
        file.seek(max(0, size - _SAMPLE_BYTES))
        digest.update(file.read(_SAMPLE_BYTES))
    return f"{size} bytes, xxh3 {digest.hexdigest()[:16]}"


def describe_versions() -> dict[str, str]:
    """Versions that must be equal on all machines: Python, the libraries, this project's own code."""
    versions = {"python": platform.python_version()}
    for package in ("torch", "deepspeed", "megatron-core"):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = "missing"
    code, root = xxhash.xxh3_128(), Path(__file__).parents[1]
    for path in sorted(root.rglob("*.py")):
        code.update(f"{path.relative_to(root)}\0".encode() + path.read_bytes())
    return versions | {"taco-pretrain": f"xxh3 {code.hexdigest()[:16]}"}


# -- side by side ------------------------------------------------------------------------------------------------------


def find_failing(reports: Sequence[NodeReport], nodes: Sequence[str]) -> dict[str, list[str]]:
    """The problems of each machine, with all `nodes` compared; good machines do not appear.

    A value that more than half of the machines share is right, and a machine with another value fails. Without such a
    majority nobody can say which one is wrong, and every machine fails.
    """
    failing = {report.node: list(report.problems) for report in reports if report.problems}
    reporting = {report.node for report in reports}
    for node in nodes:
        if node not in reporting:
            failing[node] = ["did not answer in time, or its program failed; look for its messages above"]
    for name, values in _comparable(reports).items():
        common, count = Counter(values.values()).most_common(1)[0]
        has_majority = 2 * count > len(values)
        for node, value in values.items():
            if value != common or not has_majority:
                others = f"most have {common}" if has_majority else "the machines do not agree"
                failing.setdefault(node, []).append(f"{name}: has {value}, {others}; make them alike")
    for address, owners in _shared_addresses(reports).items():
        for node in owners:
            failing.setdefault(node, []).append(f"address {address} is also that of another machine; mend /etc/hosts")
    return failing


def _comparable(reports: Sequence[NodeReport]) -> dict[str, dict[str, str]]:
    """Field -> machine -> value, for every field that must be the same; a machine itself reports what it lacks."""
    table: dict[str, dict[str, str]] = {}
    for report in reports:
        values = {**report.versions, **report.data}
        if report.gpus:
            values["GPUs"] = "; ".join(report.gpus)
        if report.meeting_point:
            values["address of the meeting point"] = report.meeting_point
        for name, value in values.items():
            table.setdefault(name, {})[report.node] = value
    return table


def _shared_addresses(reports: Sequence[NodeReport]) -> dict[str, list[str]]:
    """Addresses that several hosts claim as their own: most often 127.0.1.1, where no other machine reaches them."""
    hosts: dict[str, dict[str, str]] = {}
    for report in reports:
        if report.address:
            hosts.setdefault(report.address, {})[report.node] = report.host
    return {address: list(owners) for address, owners in hosts.items() if len(set(owners.values())) > 1}
