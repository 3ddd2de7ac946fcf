"""The command ``gr bench-stack``: the native stack beside what else computes such layers."""
