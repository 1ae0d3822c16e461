"""Views of datasets for people: rows, statistics, plots and text pages."""
