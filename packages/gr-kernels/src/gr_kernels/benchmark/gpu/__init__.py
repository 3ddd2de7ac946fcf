"""The benchmark of the layers on a GPU: what is computed, beside what, and how it is measured."""
