"""Cache of a server's models and limits; no I/O."""

from collections.abc import Iterator
from contextlib import contextmanager

from samovar._messages import Selector
from samovar.errors import SamovarError
from samovar.model import Model
from samovar.result import RunInfo, ServerInfo


class ModelCache:
    """Cached descriptions of models, and the server's limits.

    An entry is evicted when a call that used it fails, or when another artifact answers.
    """

    def __init__(self) -> None:
        self.models: dict[Selector, Model] = {}
        self.limits: ServerInfo | None = None

    def evict(self, selector: Selector) -> None:
        """Remove a model and the limits."""
        self.models.pop(selector, None)
        self.limits = None

    def validate(self, selector: Selector, run: RunInfo) -> None:
        """Evict a model if another artifact computed the response."""
        model = self.models.get(selector)
        if model and model.artifact_sha256 != run.artifact_sha256:
            self.evict(selector)

    @contextmanager
    def evict_on_error(self, selector: Selector) -> Iterator[None]:
        """Evict a model if the calls inside the block fail."""
        try:
            yield
        except SamovarError:
            self.evict(selector)
            raise
