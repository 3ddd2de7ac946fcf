"""The plugin system: descriptors, hooks, and the host that discovers what is installed."""
