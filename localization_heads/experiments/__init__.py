"""The paper's experiments: pure functions from a `Study` of a model to the paper's tables and figures."""
