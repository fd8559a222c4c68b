"""Results in the formats of other tools: detections, data sets, lists of heads, the hub, pipelines."""
