"""Models by their name on the hub: fetched into its cache, with a bar, and then read as any other folder."""

import os
import re
import sys
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled
from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

from pldr.files import one_line

# All that is read of a model's folder: code of its own, pickles and other formats stay where they are.
_FILES = ["*.json", "*.jsonl", "*.safetensors", "*.model", "SHA256SUMS", "README.md"]
_NAME = re.compile(r"([\w-][\w.-]*/[\w-][\w.-]*)(?:@([\w./-]+))?")


def local_path(name: str | os.PathLike[str]) -> Path:
    """A path as it is; but where nothing is there, and it may be a name on the hub, the folder of that model, fetched or cached.

    Args:
        name: a path, or OWNER/NAME or OWNER/NAME@REVISION.

    Raises:
        FileNotFoundError: the hub has no such model, or can not be asked.
    """
    path = Path(name)
    found = _NAME.fullmatch(name) if isinstance(name, str) else _NAME.fullmatch(path.as_posix())
    if found is None or path.exists() or path.is_symlink() or path.parent.exists():
        return path
    hidden = are_progress_bars_disabled()
    if hidden and sys.stderr.isatty():
        enable_progress_bars()
    try:
        return Path(_fetched(found[1], found[2]))
    except LocalEntryNotFoundError as error:
        raise FileNotFoundError(
            f"{name}: no such folder here, and the hub can not be asked for a model of this name ({_cause(error)})"
        ) from None
    except (HfHubHTTPError, HFValidationError, ValueError) as error:
        raise FileNotFoundError(
            f"{name}: no such folder here, and no model on the hub that can be read ({one_line(error)})"
        ) from None
    finally:
        if hidden:
            disable_progress_bars()


def _fetched(name: str, revision: str | None) -> str:
    """The folder in the hub's cache."""
    try:
        return snapshot_download(name, revision=revision, allow_patterns=_FILES)
    except OfflineModeIsEnabled:  # by huggingface_hub 1, of a commit in a cache that an earlier one wrote
        return snapshot_download(name, revision=revision, allow_patterns=_FILES, local_files_only=True)


def _cause(error: BaseException) -> str:
    """What is behind an error that only says that there is no connection."""
    return one_line(error.__cause__ or error, limit=100)
