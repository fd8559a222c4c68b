"""Benchmarks in their published forms (RefCOCO, ReasonSeg, Ref-L4, ...), written as this tool's JSON lines."""
