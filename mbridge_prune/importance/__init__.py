"""Importance: what probes accumulate, how ranks combine it, scores and the file that keeps them."""

from mbridge_prune.importance.collector import Collector
from mbridge_prune.importance.fingerprint import model_fingerprint
from mbridge_prune.importance.scores import Scores, score
from mbridge_prune.importance.scores_file import load_scores, save_scores

__all__ = ["Collector", "Scores", "load_scores", "model_fingerprint", "save_scores", "score"]
