"""Models in Flax that read the files of others."""
