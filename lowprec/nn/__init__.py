"""Flax adapters and the layers that methods change. Import what you use: `from lowprec.nn import linen`."""
