"""Predicting clicks: tables of categorical, multi-valued and numeric fields, and behaviour sequences."""
