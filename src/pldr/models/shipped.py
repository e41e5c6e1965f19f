"""The small model that ships with pldr, and where its files are; its folder has a model card."""

from pathlib import Path

STORIES = Path(__file__).parent / "stories-10m"
# Excerpts of six public-domain books that it was not trained on: title, author, year, text.
HELD_OUT = STORIES / "held-out.jsonl"
