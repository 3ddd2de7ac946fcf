"""Measuring models and baselines by one evaluator."""
