"""Tiny models of every supported family, and inputs for them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertModel,
    CamembertConfig,
    CamembertForMaskedLM,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    ElectraConfig,
    ElectraForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    GPTJConfig,
    GPTJForCausalLM,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    PreTrainedModel,
    RobertaConfig,
    RobertaForSequenceClassification,
    XLMRobertaConfig,
    XLMRobertaForTokenClassification,
)

HIDDEN, HEADS, FFN, LAYERS, VOCAB, LENGTH = 24, 4, 20, 2, 61, 9
WORDS = {
    "hidden_size": HIDDEN, "num_attention_heads": HEADS, "intermediate_size": FFN, "vocab_size": VOCAB,
    "num_hidden_layers": LAYERS, "max_position_embeddings": 32,
}  # fmt: skip
GPT = {
    "n_embd": HIDDEN,
    "n_head": HEADS,
    "n_inner": FFN,
    "n_layer": LAYERS,
    "n_positions": 32,
    "vocab_size": VOCAB,
}
SPECIAL = {"bos_token_id": 0, "eos_token_id": 0}

FAMILIES: dict[str, Callable[[], PreTrainedModel]] = {
    "bert": lambda: BertForSequenceClassification(BertConfig(**WORDS)),
    "bert-eager": lambda: BertForMaskedLM(BertConfig(**WORDS, attn_implementation="eager")),
    "bert-encoder": lambda: BertModel(BertConfig(**WORDS), add_pooling_layer=False),
    "bert-relative": lambda: BertModel(BertConfig(**WORDS, position_embedding_type="relative_key")),
    "roberta": lambda: RobertaForSequenceClassification(RobertaConfig(**WORDS)),
    "xlm-roberta": lambda: XLMRobertaForTokenClassification(XLMRobertaConfig(**WORDS)),
    "camembert": lambda: CamembertForMaskedLM(CamembertConfig(**WORDS)),
    "electra": lambda: ElectraForSequenceClassification(ElectraConfig(**WORDS, embedding_size=HIDDEN)),
    "distilbert": lambda: DistilBertForSequenceClassification(
        DistilBertConfig(dim=HIDDEN, n_heads=HEADS, hidden_dim=FFN, n_layers=LAYERS, vocab_size=VOCAB,
                         max_position_embeddings=32)
    ),
    "gptj": lambda: GPTJForCausalLM(GPTJConfig(**GPT, **SPECIAL, rotary_dim=4)),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(**GPT, **SPECIAL)),
    "gpt-neox": lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**WORDS, **SPECIAL)),
}  # fmt: skip


def tiny(family: str, seed: int = 0) -> PreTrainedModel:
    """A model with random weights, norms and biases too, in evaluation mode."""
    torch.manual_seed(seed)
    model = FAMILIES[family]()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model.eval()


def tokens(batch: int = 2, seed: int = 1) -> torch.Tensor:
    """[batch, LENGTH] ids; none is a padding id."""
    return torch.randint(3, VOCAB, (batch, LENGTH), generator=torch.Generator().manual_seed(seed))


def output(model: torch.nn.Module, ids: torch.Tensor | None = None) -> torch.Tensor:
    """The first tensor that a model returns."""
    with torch.no_grad():
        return model(tokens() if ids is None else ids)[0]


def loss(output, batch: torch.Tensor) -> torch.Tensor:
    """A scalar that depends on everything a model returns first."""
    first = output[0]
    weights = torch.linspace(-1, 2, first.shape[-1])
    return (torch.tanh(first) * weights).sum(-1).square().mean()
