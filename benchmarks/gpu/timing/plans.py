"""Plans of the timing of steps: in full, and of a rehearsal."""

from dataclasses import dataclass

from benchmarks import artifacts
from benchmarks.gpu.timing import networks
from benchmarks.gpu.timing.graphs import UNET
from benchmarks.suites.efficiency import SINGLE_CALL, STEPPING, Case


@dataclass(frozen=True)
class Plan:
    """What to measure.

    Attributes:
        cases: starter models.
        rows: rows of a step that are measured first, in all runtimes.
        other_rows: rows that are measured if time is left.
        unet_rows: rows of a step of the U-Net, which is left out without any.
        unet_width: width of the U-Net.
        profile_rows: rows of the profiled steps of the starter models, and of the U-Net.
        profile_calls: steps that are profiled.
        profile_seconds: time limit of the profiler.
        seconds: time for all.
        item_seconds: time for one measurement.
        job_seconds: time limit of one compilation.
        threads: threads of a process that compiles.
        packages: models for AOTInductor.
        compiled: models for torch.compile.
    """

    cases: tuple[Case, ...]
    rows: tuple[int, ...]
    other_rows: tuple[int, ...]
    unet_rows: tuple[int, ...]
    unet_width: int
    profile_rows: tuple[int, int]
    profile_calls: int
    profile_seconds: float
    seconds: float
    item_seconds: float
    job_seconds: float
    threads: int
    packages: tuple[Case, ...] = ()
    compiled: tuple[Case, ...] = ()


FULL = Plan(
    cases=(*STEPPING, *SINGLE_CALL),
    rows=(1, 8, 64, 256),
    other_rows=(2, 4, 16, 32, 128, 512, 1024),
    unet_rows=(1, 2, 4, 8, 16, 32, 64, 128),
    unet_width=networks.WIDTH,
    profile_rows=(256, 64),
    profile_calls=20,
    profile_seconds=35,
    seconds=128,
    item_seconds=0.05,
    job_seconds=90,
    threads=4,
    packages=(UNET, *STEPPING, *SINGLE_CALL),
    compiled=(UNET, *STEPPING),
)
_QUICK = tuple(case for case in FULL.cases if case.model in artifacts.QUICK)
REHEARSAL = Plan(
    cases=_QUICK,
    rows=(1, 8),
    other_rows=(2,),
    unet_rows=(1, 4),
    unet_width=16,
    profile_rows=(8, 4),
    profile_calls=2,
    profile_seconds=25,
    seconds=60,
    item_seconds=0.02,
    job_seconds=45,
    threads=1,
    packages=_QUICK[-1:],
)
