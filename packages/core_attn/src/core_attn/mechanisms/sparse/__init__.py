"""Mechanisms that compute some of the pairs of tokens only."""
