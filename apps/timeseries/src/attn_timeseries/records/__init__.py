"""Predictions from irregular records: stays with observations at uneven times, and notes."""
