"""The command ``gr``. Commands import what they need when they run; asking for help is quick."""

from gr_core.cli.app import main

__all__ = ["main"]
