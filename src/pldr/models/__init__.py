"""The model that ships with pldr, and where it is."""
