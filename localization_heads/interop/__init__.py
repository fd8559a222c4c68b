"""Results in the formats of other tools: COCO, supervision, FiftyOne and transformers pipelines."""
