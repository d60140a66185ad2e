"""Adapters that enter a model from outside, by rule."""
