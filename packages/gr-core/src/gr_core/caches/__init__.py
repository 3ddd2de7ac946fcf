"""Caches that ship with gr-core."""
