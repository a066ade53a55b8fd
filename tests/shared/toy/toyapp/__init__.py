"""A small application for the engine's tests: synthetic regression with an MLP that has dropout."""
