"""Repeating the tables of the paper and the results of the documentation."""
