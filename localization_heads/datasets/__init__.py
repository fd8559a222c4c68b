"""Benchmarks in their published forms (RefCOCO, ReasonSeg, Ref-L4, ScreenSpot, ...), written as this tool's JSON lines."""
