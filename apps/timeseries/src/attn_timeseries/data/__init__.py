"""Data of the forecasting application: cards, reading of tables, windows, calendar features."""
