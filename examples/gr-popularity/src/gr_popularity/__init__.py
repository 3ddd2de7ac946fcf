"""A popularity recommender as a plugin of gr-core."""
