"""A recommender as a plugin of gr-core: model, engine and command."""
