"""The log: JSON, one object a line, on standard error."""

import logging
import time
import warnings
from typing import Any

from pldr.files import one_line, to_json


class _JsonLines(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        fields: dict[str, Any] = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03}Z",
            "level": record.levelname.lower(),
            "event": record.getMessage(),
        }
        fields |= getattr(record, "fields", {})
        if record.exc_info:
            fields["traceback"] = self.formatException(record.exc_info)
        return to_json(fields)


def log_to_standard_error() -> None:
    """Everything that is logged or warned of from now on."""
    handler = logging.StreamHandler()
    handler.setFormatter(_JsonLines())
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    logging.getLogger("pldr.serving").setLevel(logging.INFO)
    warnings.showwarning = _log_warning  # type: ignore[assignment]  # of what it is told, one thing is of use


def _log_warning(message: Any, *_: Any) -> None:
    logging.getLogger("pldr.serving").warning(one_line(str(message), 1000))
