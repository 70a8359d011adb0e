"""TFDS builders of our own: they prepare offline, without tensorflow. Importing one of them imports tfds."""
