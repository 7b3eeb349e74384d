"""Settings that a run can have, but that hardly anybody means: what npdrt says of them."""

from __future__ import annotations

from collections.abc import Iterator

from npdrt import optim
from npdrt.errors import Error
from npdrt.plain import counted
from npdrt.train.config import Config
from npdrt.train.limits import cores
from npdrt.train.provenance import blas
from npdrt.train.rules import parsed


def require_learning(config: Config) -> None:
    """Raise `Error` for a bound of 0 on the norms, under which every array becomes 0."""
    groups = (parsed(group)[1] for group in config.groups)
    if any(settings.get("norm_bound") == 0 for settings in (config.optimizer_options, *groups)):
        raise Error(
            "norm_bound must be above 0 in a run; with 0 every array becomes 0, and nothing is "
            "learned"
        )


def cautions(config: Config) -> Iterator[str]:
    """Warnings about settings; made when the BLAS threads are set."""
    yield from of_threads(config.threads)
    schedule = optim.schedule(config.schedule, lr=1.0, steps_per_epoch=1, steps=1)
    if getattr(getattr(schedule, "then", schedule), "factor", 0.0) > 1:
        yield (
            f"schedule {config.schedule}: the factor is above 1, so the learning rate grows; with "
            "a factor below 1 it falls"
        )


def of_threads(asked: int | None) -> Iterator[str]:
    """A warning if more BLAS threads were asked for than there are cores, and how many run."""
    if asked and asked > (here := cores()):
        running = max((library["threads"] for library in blas()), default=0)
        yield (
            f"threads {asked}: this machine has {counted(here, 'core')}, and BLAS runs "
            f"{counted(running, 'thread')}; more threads than cores make the work slower"
        )
