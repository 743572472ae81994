"""Tile choices as data: tables/<op>.<gpu>.json, read by lookup.py, written by benchmarks/tune.py."""
