"""Retrieval without the matrix: torch matmuls over tiles of s in bounded, preallocated buffers."""
