"""Segmenting images and volumes: data, task, scores, prediction."""
