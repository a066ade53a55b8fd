"""Forecasts on a graph of sensors: the data, the task and its figures."""
