"""A recipe to a model."""
