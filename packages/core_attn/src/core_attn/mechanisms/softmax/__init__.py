"""Mechanisms that are exact softmax attention, one file a paper."""
