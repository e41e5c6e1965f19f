"""The small model that comes with the package: its folder has a model card."""

from pathlib import Path

STORIES = Path(__file__).parent / "models" / "stories-10m"
