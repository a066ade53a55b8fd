"""Pathology: bags of instances that have one label (multiple-instance learning), and survival."""
