"""The named methods, a file a family; each is a value that can be read beside its source."""
