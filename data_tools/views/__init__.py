"""Datasets as people look at them: rows, statistics, pictures and pages."""
