"""What a client remembers of a server, until something contradicts it. Does no I/O."""

from collections.abc import Iterator
from contextlib import contextmanager

from samovar._messages import Selector
from samovar.errors import SamovarError
from samovar.model import Model
from samovar.result import RunInfo, ServerInfo


class ModelCache:
    """Models as the server described them, and its limits."""

    def __init__(self) -> None:
        self.models: dict[Selector, Model] = {}
        self.limits: ServerInfo | None = None

    def forget(self, selector: Selector) -> None:
        """Ask anew the next time."""
        self.models.pop(selector, None)
        self.limits = None

    def confirm(self, selector: Selector, run: RunInfo) -> None:
        """Forget a model when another artifact has answered in its name."""
        model = self.models.get(selector)
        if model and model.artifact_sha256 != run.artifact_sha256:
            self.forget(selector)

    @contextmanager
    def trusting(self, selector: Selector) -> Iterator[None]:
        """Forget a model when a call that relies on its description fails."""
        try:
            yield
        except SamovarError:
            self.forget(selector)
            raise
