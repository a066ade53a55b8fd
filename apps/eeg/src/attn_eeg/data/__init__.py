"""Recordings, preprocessing, splits: from files to windows."""
