"""GradNAS for transformers models: wrappers of their blocks, importance by gradients, the round trip."""

from mbridge_prune.huggingface import bert, gpt
from mbridge_prune.huggingface.importance import squared_gradients
from mbridge_prune.huggingface.masks import Masks
from mbridge_prune.huggingface.whole_model import SUPPORTED, table_of

__all__ = ["SUPPORTED", "Masks", "bert", "gpt", "squared_gradients", "table_of"]
