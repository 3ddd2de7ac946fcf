"""Training of small models: seeded, resumable, on CPU or GPU."""
