"""Sizes that a layer, its groups or the exported config cannot have: refused at the door, with what would do."""

from __future__ import annotations

import pytest
import torch
from matrix import load
from models import cut

import mbridge_prune as mbp
from mbridge_prune.dry_run import check_target

REFUSED = [
    # Experts: as many as a token is sent to, and as many as are taken out of a routing group, in each.
    ("qwen3_moe", {"num_moe_experts": 1}, "num_moe_experts=1 is too few for moe_router_topk=2; smallest choice: 2"),
    ("gpt_oss", {"num_moe_experts": 2}, "num_moe_experts=2 is too few for moe_router_topk=3; smallest choice: 3"),
    ("nemotron_h_moe", {"num_moe_experts": 2}, "num_moe_experts=2 is too few for moe_router_topk=3"),
    ("deepseek_v3", {"num_moe_experts": 3}, "num_moe_experts=3 is too few for moe_router_topk=4 out of 2 of 3 "
     "routing groups; smallest choice: 6"),
    ("deepseek_v3", {"num_moe_experts": 7}, "num_moe_experts=7 is not a multiple of its 3 groups.*6, 9"),
    ("deepseek_v2", {"num_moe_experts": 4}, "num_moe_experts=4 is not a multiple of its 3 groups.*3, 6"),
    ("qwen3_moe_mixed", {"num_moe_experts": 10}, r"num_moe_experts=10 is outside 1\.\.9"),
    ("qwen3_moe_mixed", {"moe_ffn_hidden_size": 33}, r"moe_ffn_hidden_size=33 is outside 1\.\.32"),
    ("qwen3_next", {"moe_shared_expert_intermediate_size": 0}, r"moe_shared_expert_intermediate_size=0 is outside"),
    # Mamba heads in SSM groups.
    ("nemotron_h", {"mamba_num_heads": 5}, "mamba_num_heads=5 is not a multiple of its 2 groups.*4, 6"),
    ("nemotron_h", {"mamba_num_heads": 1}, "mamba_num_heads=1 is not a multiple of its 2 groups.*2"),
    ("nemotron_h", {"mamba_head_dim": 13}, r"mamba_head_dim=13 is outside 1\.\.12"),
    # Heads in query groups.
    ("gemma", {"num_query_groups": 1, "num_attention_heads": 6}, "num_attention_heads=6 in num_query_groups=1 is 6 "
     "each, the model has 4; largest choice: 4"),
    ("gpt_oss", {"num_attention_heads": 5}, "num_attention_heads=5 is not a multiple of its 2 groups.*4, 6"),
    ("nemotron_h_moe", {"num_query_groups": 3}, r"num_query_groups=3 is outside 1\.\.2"),
    # The hidden size that a vision projector writes.
    ("gemma3_vl", {"hidden_size": 40}, "hidden_size=40: the vision projector of Gemma3VLModel writes 64"),
    ("qwen2_5_vl", {"hidden_size": 40}, "hidden_size=40: the vision projector of Qwen25VLModel writes 64"),
    ("qwen3_vl", {"hidden_size": 40}, "hidden_size=40: the vision projector of Qwen3VLModel writes 64"),
    ("qwen3_vl_moe", {"hidden_size": 40}, "hidden_size=40: the vision projector of Qwen3VLModel writes 64"),
    ("glm4v_moe", {"hidden_size": 40}, "hidden_size=40: the vision projector of GLM45VModel writes 64"),
    # What other families have.
    ("gemma3", {"num_moe_experts": 4}, "num_moe_experts is no dimension of .*GPTModel here; this model has: .*"
     "ffn_hidden_size=96"),
    ("qwen3_moe", {"ffn_hidden_size": 48}, "ffn_hidden_size is no dimension .*moe_ffn_hidden_size=32"),
    ("olmoe", {"num_query_groups": 2}, "num_query_groups is no dimension .*num_attention_heads=8"),
    ("moonlight", {"num_query_groups": 2}, "num_query_groups is no dimension .*num_attention_heads=8"),
    ("qwen3_moe", {"moe_shared_expert_intermediate_size": 8}, "moe_shared_expert_intermediate_size is no dimension"),
    ("qwen3_next", {"mamba_num_heads": 2}, "mamba_num_heads is no dimension of GPTModel here"),
    ("nemotron_h", {"num_moe_experts": 4}, "num_moe_experts is no dimension of MambaModel here.*mamba_num_heads=8"),
    ("nemotron_h", {"mamba_num_head": 4}, "unknown hparam 'mamba_num_head'.*did you mean 'mamba_num_heads'"),
]  # fmt: skip
UNSAYABLE = [
    ("deepseek_v3", {"moe_shared_expert_intermediate_size": 16}, "moe_shared_expert_intermediate_size=16 is no multiple "
     "of moe_ffn_hidden_size=32.*n_shared_experts.*moe_shared_expert_intermediate_size=32"),
    ("moonlight", {"moe_ffn_hidden_size": 24}, "moe_shared_expert_intermediate_size=64 is no multiple of "
     "moe_ffn_hidden_size=24.*give moe_shared_expert_intermediate_size=48"),
    ("glm4_moe", {"moe_ffn_hidden_size": 24}, "moe_shared_expert_intermediate_size=32 is no multiple of "
     "moe_ffn_hidden_size=24.*give moe_shared_expert_intermediate_size=24"),
    ("olmoe", {"hidden_size": 40}, "derives a head's channels as hidden_size / num_attention_heads"),
    ("olmoe", {"num_attention_heads": 4}, "prune both so that hidden_size = 8 x num_attention_heads"),
    ("qwen2_5_vl", {"num_attention_heads": 4}, "derives a head's channels as hidden_size / num_attention_heads"),
    ("qwen2_5_vl", {"num_query_groups": 1}, "derives a head's channels as hidden_size / num_attention_heads"),
]  # fmt: skip


def names(cases):
    return [f"{family}-{'-'.join(f'{k}={v}' for k, v in sizes.items())}" for family, sizes, _ in cases]


def fail(model):
    raise AssertionError("nothing may be run for a request that cannot be met")


@pytest.mark.parametrize(("family", "sizes", "message"), REFUSED, ids=names(REFUSED))
def test_sizes_that_do_not_fit(family, sizes, message, hf_folder):
    model = load(hf_folder(family)).unwrapped_model
    before = {name: tensor.clone() for name, tensor in model.state_dict().items() if torch.is_tensor(tensor)}
    with pytest.raises(mbp.UserError, match=message):
        cut(model, sizes, forward_loop=fail)
    after = model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    with pytest.raises(mbp.UserError, match=message):  # and from config.json alone
        check_target(hf_folder(family), sizes, trust_remote_code=True)


@pytest.mark.parametrize(("family", "sizes", "message"), UNSAYABLE, ids=names(UNSAYABLE))
def test_sizes_that_the_exported_config_cannot_say(family, sizes, message, hf_folder, tmp_path):
    with pytest.raises(mbp.UserError, match=message):
        check_target(hf_folder(family), sizes, trust_remote_code=True)
    loaded = load(hf_folder(family))
    plan = cut(loaded.unwrapped_model, sizes)  # Megatron could have them
    with pytest.raises(mbp.UserError):
        mbp.export_hf(loaded.bridge, loaded.model, tmp_path / "hf", layers_kept=plan.layers_kept,
                      sizes=plan.sizes_after, source=hf_folder(family), trust_remote_code=True)  # fmt: skip
    assert list(tmp_path.iterdir()) == [], "nothing is left"


def test_together_they_can_be_said(hf_folder):
    check_target(hf_folder("olmoe"), {"hidden_size": 40, "num_attention_heads": 5})
    check_target(
        hf_folder("moonlight"), {"moe_ffn_hidden_size": 24, "moe_shared_expert_intermediate_size": 24}
    )
    check_target(
        hf_folder("deepseek_v3"), {"num_moe_experts": 6, "num_attention_heads": 5, "hidden_size": 40}
    )
