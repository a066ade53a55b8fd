"""Modelling the language of genomes."""
