"""What the engine asks of a runtime: open a graph file, then call it with tensors."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from server.spec import GraphSpec


@dataclass(frozen=True)
class Device:
    """Where graphs run, and on how many CPU threads each."""

    name: str = "cpu"
    threads: int = 1

    @property
    def torch(self) -> torch.device:
        return torch.device(self.name)

    @property
    def is_cuda(self) -> bool:
        return self.torch.type == "cuda"


class Graph(Protocol):
    """A pure function over rows: tensors [B, *row shape] in and out, in the order of its spec."""

    def __call__(self, inputs: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]: ...


class OpenGraph(Protocol):
    """Loads a graph file; ArtifactRefused when the file is not what the spec says."""

    def __call__(self, path: Path, spec: GraphSpec, device: Device) -> Graph: ...
