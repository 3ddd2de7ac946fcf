"""Repositories for Triton Inference Server."""

from __future__ import annotations
