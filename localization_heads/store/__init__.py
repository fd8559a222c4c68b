"""Attention files, analyses, statistics, predictions and tables on disk: written whole, read with suspicion."""

from localization_heads.data.masks import encode_mask
from localization_heads.store.atomic import atomic_write, write_bytes, write_csv, write_json
from localization_heads.store.attention_files import (
    load_analysis,
    load_attention,
    save_analysis,
    save_attention,
)
from localization_heads.store.lock import RunLock
from localization_heads.store.paths import analysis_path, attention_path, check_id, entry_path, side_path
from localization_heads.store.predictions import Prediction, read_predictions, write_predictions
from localization_heads.store.statistics import RowView, StatisticsRows, StatisticsStore, sample_key

__all__ = [
    "Prediction",
    "RowView",
    "RunLock",
    "StatisticsRows",
    "StatisticsStore",
    "analysis_path",
    "atomic_write",
    "attention_path",
    "check_id",
    "encode_mask",
    "entry_path",
    "load_analysis",
    "load_attention",
    "read_predictions",
    "sample_key",
    "save_analysis",
    "save_attention",
    "side_path",
    "write_bytes",
    "write_csv",
    "write_json",
    "write_predictions",
]
