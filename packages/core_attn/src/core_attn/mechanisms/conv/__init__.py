"""Mechanisms that mix tokens by convolution or correlation along the sequence."""
