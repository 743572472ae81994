"""Tile choices as data: tables/<op>.<gpu>.json, read by lookup.py, filled by benchmarks/tune.py."""
