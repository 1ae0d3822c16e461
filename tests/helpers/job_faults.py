"""What can be done to a running training job from outside: to its ranks, its nodes, its files, and through SLURM."""

from __future__ import annotations

import contextlib
import random
import signal
from pathlib import Path

import psutil
from slurm_cluster import LOCAL_SLURM, Cluster

from pretrain.checkpoint.manifest import list_checkpoints


def ranks_of(config: Path) -> list[psutil.Process]:
    """Running training processes with this configuration, in the order of their ranks."""
    found: dict[int, psutil.Process] = {}
    for process in psutil.process_iter(["cmdline"]):
        if "pretrain.train" in (process.info["cmdline"] or []) and str(config) in process.info["cmdline"]:
            with contextlib.suppress(psutil.Error):
                rank = process.environ().get("RANK")
                if rank is not None:
                    found[int(rank)] = process
    return [found[rank] for rank in sorted(found)]


class Fault:
    """Something that is done to a running job; `choose` is for what may hit one of several."""

    settings: dict[str, str] = {}

    def inject(self, cluster: Cluster, job: str, config: Path, choose: random.Random | None = None) -> bool:
        """Do it; False where there is nothing that it could hit."""
        raise NotImplementedError

    def heal(self, cluster: Cluster) -> None:
        """Undo what outlives the job."""


class TimeLimitSignal(Fault):
    """What SLURM sends before the time limit (`--signal=B:USR1@300`), sent by hand."""

    def inject(self, cluster: Cluster, job: str, config: Path, choose: random.Random | None = None) -> bool:
        cluster.call("scancel", "--batch", "--signal=USR1", job)
        return True


class TimeLimitSignalUnderTorchrun(TimeLimitSignal):
    settings = {"TACO_LAUNCHER": "torchrun"}


class Preemption(Fault):
    """An urgent job wants all nodes: ranks get SIGTERM, save, and end in good order, which SLURM takes for done."""

    def inject(self, cluster: Cluster, job: str, config: Path, choose: random.Random | None = None) -> bool:
        listing = cluster.call("sinfo", "--noheader", "--Node", "--partition=urgent", "--states=alloc,idle,mixed")
        nodes = len(listing.splitlines())
        urgent = ("--partition=urgent", f"--nodes={nodes}", "--exclusive", "--mem=0", "--output=/dev/null")
        cluster.call("sbatch", *urgent, "--wrap=sleep 2")
        return True

    def heal(self, cluster: Cluster) -> None:
        """An urgent job that still waits would preempt somebody else's."""
        cluster.call("scancel", "--partition=urgent", check=False)


class KilledRank(Fault):
    """A signal to one rank that it cannot catch."""

    number = signal.SIGKILL

    def inject(self, cluster: Cluster, job: str, config: Path, choose: random.Random | None = None) -> bool:
        ranks = ranks_of(config)
        if not ranks:
            return False
        with contextlib.suppress(psutil.NoSuchProcess):
            (choose.choice(ranks) if choose else ranks[-1]).send_signal(self.number)
            return True
        return False


class StoppedRank(KilledRank):
    """A rank that hangs: the watchdog must find it."""

    number = signal.SIGSTOP


class AskedRank(KilledRank):
    """A request to stop, to one rank alone."""

    number = signal.SIGTERM


class KilledRanks(Fault):
    """All ranks at once."""

    def inject(self, cluster: Cluster, job: str, config: Path, choose: random.Random | None = None) -> bool:
        ranks = ranks_of(config)
        for process in ranks:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        return bool(ranks)


class FlippedBit(KilledRanks):
    """One bit of the newest checkpoint's files, if there is an older one; and the ranks, so that somebody reads it."""

    def inject(self, cluster: Cluster, job: str, config: Path, choose: random.Random | None = None) -> bool:
        found = list_checkpoints(config.parent / "run" / "checkpoints")
        if len(found) < 2:
            return False
        choose = choose or random.Random(0)
        file = choose.choice(sorted((found[0] / "state").iterdir()))
        content = bytearray(file.read_bytes())
        place = choose.randrange(len(content) * 8)
        content[place // 8] ^= 1 << place % 8
        file.write_bytes(content)
        super().inject(cluster, job, config, choose)
        return True


class LostLatest(KilledRanks):
    """The file that names the newest checkpoint is empty."""

    def inject(self, cluster: Cluster, job: str, config: Path, choose: random.Random | None = None) -> bool:
        latest = config.parent / "run" / "checkpoints" / "latest"
        if not latest.exists():
            return False
        latest.write_text("")
        super().inject(cluster, job, config, choose)
        return True


class PowerLoss(Fault):
    """The node without the batch shell is gone with everything on it."""

    node = ""

    def inject(self, cluster: Cluster, job: str, config: Path, choose: random.Random | None = None) -> bool:
        first = cluster.show(job, "BatchHost")
        nodes = cluster.call("scontrol", "show", "hostnames", cluster.show(job, "NodeList")).split()
        self.node = next(node for node in nodes if node != first)
        cluster.call(LOCAL_SLURM, "fail", self.node, "power")
        return True

    def heal(self, cluster: Cluster) -> None:
        """Give the node its power back, if it has lost it."""
        if self.node:
            cluster.call(LOCAL_SLURM, "heal", self.node)
