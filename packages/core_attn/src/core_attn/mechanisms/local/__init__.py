"""Mechanisms that read what is near."""
