"""Benchmarks in their published forms (RefCOCO, RefCOCO+, RefCOCOg, ReasonSeg), written as this tool's JSON lines."""
