"""The reference kernels against naive formulas written here."""

import math

import mbridge_prune  # noqa: F401  isort: skip
import pytest
import torch
import torch.nn.functional as F
import transformer_engine.pytorch as te
from fla.modules.l2norm import l2norm
from fla.ops.gated_delta_rule import chunk_gated_delta_rule
from mamba_ssm.ops.triton.ssd_combined import (
    mamba_chunk_scan_combined,
    mamba_split_conv1d_scan_combined,
)


def recurrence(x, dt, A, B, C, D):
    """y_t of the plain Mamba-2 recurrence, token by token. Shapes as in the kernel."""
    heads_per_group = x.shape[2] // B.shape[2]
    B, C = (t.repeat_interleave(heads_per_group, dim=2) for t in (B, C))
    state = x.new_zeros(x.shape[0], x.shape[2], x.shape[3], B.shape[3])
    out = []
    for t in range(x.shape[1]):
        step = dt[:, t, :, None, None]
        state = state * (A[:, None, None] * step).exp()
        state = state + step * x[:, t, :, :, None] * B[:, t, :, None, :]
        out.append((state * C[:, t, :, None, :]).sum(-1) + D[:, None] * x[:, t])
    return torch.stack(out, 1), state


@pytest.fixture
def scan_inputs():
    g = torch.Generator().manual_seed(0)
    b, length, h, p, groups, n = 2, 37, 4, 3, 2, 5

    def r(*s):
        return torch.randn(*s, generator=g, dtype=torch.float64)

    return dict(
        x=r(b, length, h, p),
        dt=r(b, length, h).exp() * 0.1,
        A=-r(h).exp(),
        B=r(b, length, groups, n),
        C=r(b, length, groups, n),
        D=r(h),
    )


@pytest.mark.parametrize("chunk_size", [1, 8, 37, 128])
def test_chunked_scan_is_the_recurrence(scan_inputs, chunk_size):
    want, want_state = recurrence(**scan_inputs)
    got, state = mamba_chunk_scan_combined(**scan_inputs, chunk_size=chunk_size, return_final_states=True)
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(state, want_state, rtol=1e-10, atol=1e-10)


def test_scan_continues_from_a_state_and_differentiates(scan_inputs):
    whole = mamba_chunk_scan_combined(**scan_inputs, chunk_size=8)
    cut = {k: v[:, 20:] if v.dim() > 1 else v for k, v in scan_inputs.items()}
    head = {k: v[:, :20] if v.dim() > 1 else v for k, v in scan_inputs.items()}
    _, middle = mamba_chunk_scan_combined(**head, chunk_size=8, return_final_states=True)
    tail = mamba_chunk_scan_combined(**cut, chunk_size=8, initial_states=middle)
    torch.testing.assert_close(tail, whole[:, 20:])
    x = scan_inputs["x"].requires_grad_()
    mamba_chunk_scan_combined(**scan_inputs, chunk_size=8).sum().backward()
    chunked, x.grad = x.grad, None
    recurrence(**scan_inputs)[0].sum().backward()
    torch.testing.assert_close(chunked, x.grad)


def test_mixer_kernel_splits_convolves_scans_and_gates(scan_inputs):
    h, p, groups, n, width = 4, 3, 2, 5, 4
    inner, conv = h * p, h * p + 2 * groups * n
    g = torch.Generator().manual_seed(1)
    zxbcdt = torch.randn(2, 19, inner + conv + h, generator=g, dtype=torch.float64)
    weight = torch.randn(conv, width, generator=g, dtype=torch.float64)
    bias, dt_bias = torch.randn(conv, generator=g).double(), torch.randn(h, generator=g).double()
    A, D = scan_inputs["A"], scan_inputs["D"]
    z, xbc, dt = zxbcdt.split([inner, conv, h], -1)
    padded = torch.cat([xbc.new_zeros(2, width - 1, conv), xbc], 1)
    xbc = F.silu(sum(padded[:, i : i + 19] * weight[:, i] for i in range(width)) + bias)
    x, B, C = xbc.split([inner, groups * n, groups * n], -1)
    want, _ = recurrence(
        x.reshape(2, 19, h, p),
        F.softplus(dt + dt_bias),
        A,
        B.reshape(2, 19, groups, n),
        C.reshape(2, 19, groups, n),
        D,
    )
    got = mamba_split_conv1d_scan_combined(
        zxbcdt, weight, bias, dt_bias, A, D, chunk_size=8, headdim=p, ngroups=groups
    )
    torch.testing.assert_close(got, want.flatten(-2) * F.silu(z))


def delta_recurrence(q, k, v, g, beta):
    """Outputs and last state of the gated delta rule, token by token. Shapes as in the kernel."""
    state = q.new_zeros(*q.shape[:1], *q.shape[2:], v.shape[-1])
    out = []
    for t in range(q.shape[1]):
        state = state * g[:, t, :, None, None].exp()
        read = (state * k[:, t, :, :, None]).sum(-2)
        correction = beta[:, t, :, None] * (v[:, t] - read)
        state = state + k[:, t, :, :, None] * correction[:, :, None]
        out.append((state * q[:, t, :, :, None]).sum(-2) / math.sqrt(q.shape[-1]))
    return torch.stack(out, 1), state


@pytest.fixture
def delta_inputs():
    generator = torch.Generator().manual_seed(2)

    def r(*s):
        return torch.randn(*s, generator=generator, dtype=torch.float64)

    b, length, h, d, e = 2, 37, 3, 4, 5
    return dict(
        q=r(b, length, h, d),
        k=F.normalize(r(b, length, h, d), dim=-1),
        v=r(b, length, h, e),
        g=-F.softplus(r(b, length, h)),
        beta=r(b, length, h).sigmoid(),
    )


@pytest.mark.parametrize("chunk_size", [1, 8, 37, 64])
def test_chunked_delta_rule_is_the_recurrence(delta_inputs, chunk_size):
    want, want_state = delta_recurrence(**delta_inputs)
    got, state = chunk_gated_delta_rule(**delta_inputs, chunk_size=chunk_size, output_final_state=True)
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(state, want_state, rtol=1e-10, atol=1e-10)


def test_delta_rule_continues_from_a_state_normalises_and_differentiates(delta_inputs):
    whole, none = chunk_gated_delta_rule(**delta_inputs, chunk_size=8)
    assert none is None
    head, tail = ({k: v[:, part] for k, v in delta_inputs.items()} for part in (slice(20), slice(20, None)))
    _, middle = chunk_gated_delta_rule(**head, chunk_size=8, output_final_state=True)
    rest, _ = chunk_gated_delta_rule(**tail, chunk_size=8, initial_state=middle)
    torch.testing.assert_close(rest, whole[:, 20:])
    unit = {**delta_inputs, "q": l2norm(delta_inputs["q"]), "k": l2norm(delta_inputs["k"])}
    torch.testing.assert_close(unit["q"].norm(dim=-1), torch.ones(2, 37, 3).double(), rtol=1e-5, atol=0)
    inside, _ = chunk_gated_delta_rule(**delta_inputs, use_qk_l2norm_in_kernel=True)
    torch.testing.assert_close(inside, delta_recurrence(**unit)[0])
    k = delta_inputs["k"].requires_grad_()
    chunk_gated_delta_rule(**delta_inputs, chunk_size=8)[0].sum().backward()
    chunked, k.grad = k.grad, None
    delta_recurrence(**delta_inputs)[0].sum().backward()
    torch.testing.assert_close(chunked, k.grad)


@pytest.mark.parametrize("return_bias", [False, True])
def test_layernorm_linear_reads_return_layernorm_output_at_forward(return_bias):
    layer = te.LayerNormLinear(
        8,
        6,
        normalization="RMSNorm",
        return_bias=return_bias,
        params_dtype=torch.float32,
        parallel_mode="column",
    )
    x = torch.randn(3, 2, 8)
    plain = layer(x)
    assert isinstance(plain, tuple) == return_bias
    layer.return_layernorm_output = True
    *head, normed = layer(x)
    assert len(head) == 1 + return_bias
    want = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + layer.eps)
    torch.testing.assert_close(normed, want)
    torch.testing.assert_close(head[0], normed @ layer.weight.T)


def naive_attention(q, k, v, causal, window):
    """(s, b, h, d) in, (s, b, h d) out, one score matrix a head."""
    k, v = (t.repeat_interleave(q.shape[2] // k.shape[2], dim=2) for t in (k, v))
    scores = torch.einsum("ibhd,jbhd->bhij", q, k) / math.sqrt(q.shape[-1])
    i, j = torch.arange(q.shape[0])[:, None], torch.arange(k.shape[0])
    allowed = torch.ones(len(i), len(j), dtype=torch.bool)
    if causal:
        allowed &= j <= i
    if window:
        allowed &= j >= i - window[0]
    scores = scores.masked_fill(~allowed, float("-inf"))
    return torch.einsum("bhij,jbhd->ibhd", scores.softmax(-1), v).flatten(2)


@pytest.mark.parametrize("mask,window", [("causal", None), ("no_mask", None), ("causal", (3, 0))])
@pytest.mark.parametrize("groups,v_dim", [(4, 8), (2, 8), (2, 6)])
def test_attention_is_naive_attention(mask, window, groups, v_dim):
    attention = te.DotProductAttention(
        4, (8, v_dim), num_gqa_groups=groups, attn_mask_type=mask, window_size=window
    )
    q, k, v = torch.randn(11, 2, 4, 8), torch.randn(11, 2, groups, 8), None
    v = torch.randn(11, 2, groups, v_dim)
    want = naive_attention(q, k, v, mask == "causal", window)
    torch.testing.assert_close(attention(q, k, v), want)


def test_queries_behind_a_cache_see_all_of_it():
    """`causal_bottom_right`: the last of fewer queries is the last key's."""
    attention = te.DotProductAttention(4, 8, num_gqa_groups=2, attn_mask_type="causal")
    q, k, v = torch.randn(11, 2, 4, 8), torch.randn(11, 2, 2, 8), torch.randn(11, 2, 2, 8)
    want = naive_attention(q, k, v, True, None)[-3:]
    torch.testing.assert_close(attention(q[-3:], k, v, attn_mask_type="causal_bottom_right"), want)


@pytest.mark.parametrize("window", [None, (3, 0)])
@pytest.mark.parametrize("mask", ["causal", "arbitrary"])
def test_a_learnable_softmax_offset_is_one_more_logit(mask, window):
    attention = te.DotProductAttention(
        4, 8, num_gqa_groups=2, attn_mask_type=mask, window_size=window, softmax_type="learnable"
    )
    sinks = torch.randn(4)
    attention.softmax_offset.data.copy_(sinks)
    q, k, v = torch.randn(11, 2, 4, 8), torch.randn(11, 2, 2, 8), torch.randn(11, 2, 2, 8)
    later = torch.ones(11, 11, dtype=torch.bool).triu(1).expand(2, 1, 11, 11)
    got = attention(q, k, v, later if mask == "arbitrary" else None)
    i, j = torch.arange(11)[:, None], torch.arange(11)
    blocked = (j > i) | ((j < i - 3) if window else (j < 0))
    scores = torch.einsum("ibhd,jbhd->bhij", q, k.repeat_interleave(2, 2)) / math.sqrt(8)
    weights = scores.masked_fill(blocked, float("-inf")).exp()
    weights = weights / (weights.sum(-1, keepdim=True) + sinks.exp()[:, None, None])
    want = torch.einsum("bhij,jbhd->ibhd", weights, v.repeat_interleave(2, 2)).flatten(2)
    torch.testing.assert_close(got, want)


def test_grouped_linear_serves_experts_without_tokens():
    layer = te.GroupedLinear(3, 5, 4, bias=False, params_dtype=torch.float32)
    x = torch.randn(7, 5)
    out = layer(x, [4, 0, 3])
    torch.testing.assert_close(out[:4], x[:4] @ layer.weight0.T)
    torch.testing.assert_close(out[4:], x[4:] @ layer.weight2.T)
    out.sum().backward()
    assert not layer.weight1.grad.any()


@pytest.mark.parametrize("kind", [te.Linear, te.LayerNormLinear, te.GroupedLinear, te.LayerNorm, te.RMSNorm])
def test_modules_have_the_checkpoint_key_of_transformer_engine_and_load_without_it(kind):
    sizes = {te.GroupedLinear: 3, te.LayerNorm: 1, te.RMSNorm: 1}.get(kind, 2)
    module = kind(*[2] * sizes)
    state = module.state_dict()
    assert state.pop("_extra_state").numel() == 0
    module.load_state_dict(state)
