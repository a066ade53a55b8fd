"""Forecasting models, one file a paper. `attn_timeseries.config.MODELS` lists them without importing torch."""
