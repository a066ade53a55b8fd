"""Classifying sequences."""
