"""What becomes of four ranks if one is killed, stopped, raises, or lacks memory or disk, or if the
run is told to end: trials at random moments, as a table. Needs the extra mpi, Linux, and root for
the full disk.

A trial starts `mpiexec -n 4 npdrt train`, in which one rank meets its fault in the start, the first
step, an exchange, an evaluation or a checkpoint. All must end in ten seconds, with one message and
the documented exit code; then the checkpoint must be whole, and the run, resumed on 1 to 3 ranks,
must have the bits of a run that nothing disturbed.
"""

from __future__ import annotations

import collections
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import report

RANKS, IN_TIME = 4, 10.0  # seconds in which all should end
PATIENCE, REACHED = 40.0, 600.0  # seconds after which we end them; in which the fault must come
TRAIN = ["train", "--depth", "4", "--width", "16", "--batch-size", "50", "--shards", "4",
         "--epochs", "3", "--checkpoint-every", "5", "--device", "cpu"]  # fmt: skip
OPEN_MPI = {
    "OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
}  # fmt: skip
MOMENTS = ("start", "first step", "exchange", "evaluation", "checkpoint")
KINDS = {  # name: exit code with MPICH, with Open MPI, the message
    "killed": (9, 137, r"signal 9|KILLED BY SIGNAL: 9"),
    "stopped": (1, 1, r"^Error: .*(gives no sign of life|was stopped or has ended)"),
    "raises": (1, 1, r"^Error: rank \d: RuntimeError: planted"),
    "no memory": (4, 4, r"^Error: rank \d: not enough memory"),
    "full disk": (5, 5, r"^Error: rank \d: .*could not be written"),
    "Ctrl-C": (130, 130, r"stopped by signal 2 "),
    "SIGTERM": (143, 143, r"stopped by signal 15 "),
    "SIGTERM to a rank": (143, 143, r"stopped by signal 15 "),
    "mpiexec killed": (-9, -9, ""),
}

EARLY = {  # exit codes of a start that is interrupted before the ranks have met
    "stopped": {9, 137}, "Ctrl-C": {2, 130}, "SIGTERM": {15, 143}, "SIGTERM to a rank": {15, 143},
}  # fmt: skip


# --- in a rank -------------------------------------------------------------------------------


def rank_of_process() -> int:
    return int(os.environ.get("PMI_RANK", os.environ.get("OMPI_COMM_WORLD_RANK", "0")))


def launcher() -> int:
    """The process that the benchmark has started: `mpiexec`."""
    found, parent = os.getpid(), os.getppid()
    while parent != int(os.environ["FAULTS_PARENT"]):
        found = parent
        words = Path(f"/proc/{parent}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
        parent = int(words[1])
    return found


def raise_error() -> None:
    raise RuntimeError("planted")


def use_memory() -> None:
    """Allocate more than the process may have."""
    import numpy as np

    pages = int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[0])
    limit = pages * resource.getpagesize() + (64 << 20)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    np.ones(1 << 30)


def fill_disk() -> None:
    with open(os.environ["FAULTS_DISK"], "wb", buffering=0) as file:  # noqa: PTH123
        try:
            for size in (1 << 16, 1):
                while file.write(bytes(size)) == size:
                    pass
        except OSError:
            pass


FAULTS: dict[str, Callable[[], None]] = {
    "killed": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "stopped": lambda: os.kill(os.getpid(), signal.SIGSTOP),
    "raises": raise_error,
    "no memory": use_memory,
    "full disk": fill_disk,
    "Ctrl-C": lambda: os.kill(launcher(), signal.SIGINT),
    "SIGTERM": lambda: os.kill(launcher(), signal.SIGTERM),
    "SIGTERM to a rank": lambda: os.kill(os.getpid(), signal.SIGTERM),
    "mpiexec killed": lambda: os.kill(launcher(), signal.SIGKILL),
}
INSIDE = ("raises", "no memory")  # faults of the function that runs; the others come from outside


def plant(kind: str, moment: str, call: int, delay: float) -> None:
    """Let the fault come at the moment's so many-th call: in it, or that many seconds later."""

    def fault() -> None:
        Path(os.environ["FAULTS_TIME"]).write_text(str(time.time()), encoding="utf-8")
        FAULTS[kind]()

    def later() -> None:
        threading.Thread(target=lambda: (time.sleep(delay), fault()), daemon=True).start()

    act = fault if kind in INSIDE else later
    if moment == "start" and kind not in INSIDE:
        act()
        return
    for place, name in places(moment):
        wrap(place, name, act, call)


def places(moment: str) -> list[tuple[Any, str]]:
    """The functions that a moment is in: object and name."""
    from npdrt.train import files, history, ranks, run, shards

    return {
        "start": [(run, "load_data")],
        "first step": [(shards.Sharded, "__call__")],
        "exchange": [(ranks.Ranks, "summed")],
        "evaluation": [(history, "evaluate")],
        "checkpoint": [(files.RunFiles, "save"), (files.Unwritten, "save")],
    }[moment]


def wrap(place: Any, name: str, act: Callable[[], None], call: int) -> None:
    original, count = getattr(place, name), [0]

    def wrapped(*args: Any, **named: Any) -> Any:
        count[0] += 1
        if count[0] == call:
            act()
        return original(*args, **named)

    setattr(place, name, wrapped)


def in_rank(words: list[str]) -> None:
    """`npdrt` with the words after the first five: a rank, its fault, moment, call and delay."""
    from npdrt import blas
    from npdrt.cli import main as npdrt

    blas.choose_kernels()  # before plant imports NumPy
    rank, kind, moment, call, delay = words[:5]
    if rank_of_process() == int(rank):
        plant(kind, moment, int(call), float(delay))
    sys.argv = ["npdrt", *words[5:]]
    npdrt()


# --- trials ----------------------------------------------------------------------------------


@dataclass
class Trial:
    """A fault and what became of it."""

    kind: str
    moment: str
    rank: int
    call: int
    delay: float
    resumed_on: int
    seconds: float = 0.0  # from the fault to the end of the last process
    code: int | None = None
    text: str = ""
    whole: bool = False
    same: bool = False

    @property
    def once(self) -> bool:
        """Whether the message came once; a start that is interrupted has none."""
        pattern = KINDS[self.kind][2]
        found = len(re.findall(pattern, self.text, re.M)) if pattern else 1
        early = self.moment == "start" and self.kind in ("Ctrl-C", "SIGTERM", "SIGTERM to a rank")
        return (found <= 1 if early or self.late else found == 1) and self.text.count(
            "stopping after"
        ) <= 1

    @property
    def coded(self) -> bool:
        """Whether the exit code is the documented one."""
        mpich, open_mpi, _ = KINDS[self.kind]
        known = {open_mpi if is_open_mpi() else mpich}
        if self.moment == "start":  # before the run listens to signals
            known |= EARLY.get(self.kind, set())
        return self.code in known or self.late

    @property
    def late(self) -> bool:
        """Whether the run had ended before it was told to, or before the disk was needed."""
        return self.code == 0 and "done:" in self.text and KINDS[self.kind][0] in (5, 130, 143)


def drawn(rng: random.Random, kind: str, moment: str) -> Trial:
    calls = {"exchange": (2, 80), "evaluation": (1, 3), "checkpoint": (1, 14)}
    delays = {"start": 2.5, "first step": 0.05, "exchange": 0.003, "evaluation": 0.003}
    delay = rng.uniform(0, delays.get(moment, 0.01))
    call = rng.randint(*calls.get(moment, (1, 1)))
    return Trial(kind, moment, rng.randrange(RANKS), call, delay, rng.randint(1, 3))


def mpiexec() -> str:
    return next(filter(None, map(shutil.which, ("mpiexec.hydra", "mpiexec"))), "mpiexec")


def is_open_mpi() -> bool:
    told = subprocess.run([mpiexec(), "--version"], capture_output=True, text=True, check=False)
    return "Open MPI" in told.stdout


def processes_of(folder: Path) -> list[int]:
    """The ranks of the run in a folder."""
    found = []
    for place in Path("/proc").iterdir():
        try:
            words = (place / "cmdline").read_bytes()
            if str(folder).encode() in words and b"in-rank" in words and place.name.isdigit():
                found.append(int(place.name))
        except OSError:
            continue
    return found


def carry_out(trial: Trial, folder: Path, out: Path) -> None:
    """Start the run `out`, and wait until all of it has ended."""
    mark = folder / "time"
    given = [trial.rank, trial.kind, trial.moment, trial.call, trial.delay]
    words = [mpiexec(), "-n", str(RANKS), sys.executable, __file__, "in-rank", *map(str, given)]
    more = {"FAULTS_PARENT": str(os.getpid()), "FAULTS_TIME": str(mark),
            "FAULTS_DISK": str(out.parent / "filler")}  # fmt: skip
    with (folder / "output").open("w+", encoding="utf-8") as output:
        process = subprocess.Popen(
            [*words, *TRAIN, "--out", str(out)], env=environment() | more, stdout=output,
            stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
        )  # fmt: skip
        begun = time.time()
        while process.poll() is None or processes_of(folder):
            fault = float(mark.read_text() or 0) if mark.exists() else 0.0
            if time.time() > (fault + PATIENCE if fault else begun + REACHED):
                for number in processes_of(folder):
                    os.kill(number, signal.SIGKILL)
                process.kill()
            time.sleep(0.02)
        ended = time.time()
        trial.code = process.wait()
    trial.text = (folder / "output").read_text(encoding="utf-8")
    trial.seconds = ended - float(mark.read_text()) if mark.exists() else 0.0


def environment() -> dict[str, str]:
    root = str(Path(__file__).parents[1])
    path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH", "")]))
    return os.environ | OPEN_MPI | {"OPENBLAS_NUM_THREADS": "1", "PYTHONPATH": path}


def is_whole(run: Path) -> bool:
    """Whether the newest checkpoint, if there is one, can be read, and what `npdrt show` says."""
    import h5py
    from click.testing import CliRunner

    from npdrt.cli import cli

    if not (run / "checkpoint.h5").exists():
        return True
    with h5py.File(run / "checkpoint.h5") as file:
        file.visititems(lambda _, item: item[()] if isinstance(item, h5py.Dataset) else None)
    return CliRunner().invoke(cli, ["show", str(run)]).exit_code == 0


def contents(run: Path) -> Any:
    """What a run came to, without times and the way it was started."""
    from npdrt import store

    kept = store.load(run / "checkpoint.h5")
    lines = (run / "log.jsonl").read_text(encoding="utf-8").splitlines()
    log = [{k: v for k, v in json.loads(line).items() if k not in ("seconds", "config")}
           for line in lines]  # fmt: skip
    arrays = {**kept.params, **kept.buffers, **kept.state}
    return {name: (str(a.dtype), a.tobytes()) for name, a in arrays.items()}, log


def finish(run: Path, ranks: int, *more: str) -> subprocess.CompletedProcess[str]:
    """Make the run to its end."""
    words = [mpiexec(), "-n", str(ranks)] if ranks > 1 else []
    return subprocess.run(
        [*words, sys.executable, "-m", "npdrt", *TRAIN, "--out", str(run), *more],
        env=environment(), capture_output=True, text=True, check=False,
    )  # fmt: skip


def judged(trial: Trial, folder: Path, expected: Any) -> Trial:
    """The trial, carried out in an empty folder."""
    disk = folder / "disk"
    disk.mkdir()
    if trial.kind == "full disk":
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "npdrt", str(disk)], check=True)
    try:
        run = disk / "run"
        carry_out(trial, folder, run)
        (disk / "filler").unlink(missing_ok=True)
        trial.whole = is_whole(run)
        again = finish(run, trial.resumed_on, "--resume")
        trial.same = not again.returncode and contents(run) == expected
        if not trial.same:
            trial.text += f"\n--- resumed: {again.returncode}\n{again.stdout}{again.stderr}"
    finally:
        if trial.kind == "full disk":
            subprocess.run(["umount", str(disk)], check=True)
    return trial


def good(t: Trial) -> bool:
    return 0 < t.seconds < IN_TIME and t.coded and t.once and t.whole and t.same


def row(kind: str, found: list[Trial]) -> list[str]:
    """A line of the table."""
    ended = [t for t in found if 0 < t.seconds < IN_TIME]
    slowest = max(t.seconds for t in found)
    counts = [len(found), len(ended), sum(t.coded for t in found), sum(t.once for t in found)]
    kept = [sum(t.whole for t in found), sum(t.same for t in found)]
    return [kind, *map(str, counts), f"{slowest:.1f}", *map(str, kept)]


def main(words: list[str] | None = None) -> None:
    """Print the table."""
    options = report.parser(__doc__)
    options.add_argument("--trials", type=int, default=100)
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--kind", choices=KINDS, action="append")
    options.add_argument("--moment", choices=MOMENTS, action="append")
    given = options.parse_args(words)
    rng = random.Random(given.seed)
    kinds = given.kind or [k for k in KINDS if k != "full disk" or os.geteuid() == 0]
    cells = [(k, m) for k in kinds for m in given.moment or MOMENTS]
    found: dict[str, list[Trial]] = collections.defaultdict(list)
    with tempfile.TemporaryDirectory() as folder:
        assert finish(Path(folder, "undisturbed"), 1).returncode == 0
        expected = contents(Path(folder, "undisturbed"))
        for number in range(given.trials):
            place = Path(folder, str(number))
            place.mkdir()
            trial = judged(drawn(rng, *cells[number % len(cells)]), place, expected)
            found[trial.kind].append(trial)
            told = [f"{number + 1}: {'as it should' if good(trial) else 'NOT as it should'}"]
            told += [] if good(trial) else [trial.text]
            print(*told, trial, sep="\n", file=sys.stderr, flush=True)
            shutil.rmtree(place)
    head = ["fault", "trials", "ended in 10 s", "exit code", "one message", "slowest, s",
            "checkpoint whole", "same bits resumed"]  # fmt: skip
    text = report.table(head, [row(kind, trials) for kind, trials in found.items()])
    print(text)
    if given.output:
        Path(f"{given.output}.md").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    if sys.argv[1:2] == ["in-rank"]:
        in_rank(sys.argv[2:])
    else:
        main()
