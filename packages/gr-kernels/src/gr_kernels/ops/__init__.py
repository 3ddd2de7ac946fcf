"""The ops: one folder each, with its definition and its implementations."""
