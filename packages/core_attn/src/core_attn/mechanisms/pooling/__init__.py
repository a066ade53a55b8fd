"""Attention that makes one vector of a set: pooling for bags of instances."""
